"""What the oracle knows of next uses, by hand; and what a simulation tells it, and is told."""

import math

import pytest

from engine.core.cache.index import chunk_key, full_chunk_keys, root_key
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.reuse import Reuse, tool_class
from engine.simulator.clients import FIRST_ANSWER_STREAM, Client
from engine.simulator.cluster import Cluster
from engine.simulator.devices import DEVICES, MODELS
from engine.simulator.oracle import Oracle
from engine.simulator.routing import LeastLoaded
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import Roofline
from engine.workloads.session import Session, Span, Turn

PROMPT, SIZE = 9, 4


def keys(token_ids: list[int], tenant: str = "") -> list[bytes]:
    return full_chunk_keys(root_key("", "", tenant), token_ids, SIZE)


def two_sessions() -> list[Session]:
    """Both begin with 8 tokens of one prompt. The first has two turns, of which the second one comes after 30 s."""
    first = Session("a", (Turn((Span(PROMPT, 8), Span(1, 2)), 5), Turn((Span(1, 3, 2),), 5, 30.0)), 10.0)
    return [first, Session("b", (Turn((Span(PROMPT, 8), Span(2, 4)), 5),), 100.0)]


def test_next_uses_follow_the_turns():
    oracle = Oracle(two_sessions(), SIZE)
    shared = keys([PROMPT] * 8)[1]
    answer = FIRST_ANSWER_STREAM
    own = keys([PROMPT] * 8 + [1, 1] + [answer] * 5)[2]
    tail = chunk_key(own, [answer] * 2)  # of 15 tokens, the last one is not computed
    assert oracle.next_use_s(shared, 0.0) == 10.0
    assert oracle.begin_turn("a") == 0
    assert [oracle.next_use_s(key, 12.0) for key in (shared, own, tail)] == [42.0, 42.0, 42.0]  # if it ends at 12 s
    oracle.end_turn("a", 14.0)
    assert [oracle.next_use_s(key, 14.0) for key in (shared, own, tail)] == [44.0, 44.0, 44.0]
    assert oracle.begin_turn("a") == 12  # of the prompt's 18 tokens; the client knows of the tail
    assert [oracle.next_use_s(key, 50.0) for key in (shared, own, tail)] == [100.0, math.inf, math.inf]
    oracle.end_turn("a", 50.0)
    assert oracle.begin_turn("b") == 8
    oracle.end_turn("b", 110.0)
    assert oracle.next_use_s(shared, 110.0) == math.inf
    assert oracle.next_use_s(None, 0.0) == oracle.next_use_s(b"unknown", 0.0) == math.inf


def test_what_a_next_turn_cuts_off_is_not_used_again():
    turns = (Turn((Span(1, 8),), 5), Turn((Span(3, 4),), 5, 30.0, keep_tokens=4))
    oracle = Oracle([Session("a", turns)], SIZE)
    oracle.begin_turn("a")
    oracle.end_turn("a", 2.0)
    assert [oracle.next_use_s(key, 2.0) for key in keys([1] * 8)] == [32.0, math.inf]


def test_many_past_uses_are_forgotten_and_the_next_one_is_still_found():
    sessions = [Session(f"s{number}", (Turn((Span(PROMPT, 8),), 2),), float(number)) for number in range(40)]
    oracle = Oracle(sessions, SIZE)
    key = keys([PROMPT] * 8)[0]
    for number in range(39):
        oracle.begin_turn(f"s{number}")
        oracle.end_turn(f"s{number}", number + 0.5)
        assert oracle.next_use_s(key, number + 0.5) == number + 1.0


def make_cluster() -> Cluster:
    cost = Roofline(MODELS["opt-13b"], DEVICES["a100-80gb"], 64 * MODELS["opt-13b"].kv_bytes_per_token)
    cache = CacheConfig(chunk_size=64, num_gpu_blocks=40, cost_model=cost.cost_model(64))
    scheduling = SchedulingConfig(max_model_len=2048)
    return Cluster(make_core=lambda: EngineCore(cache, scheduling), cost=cost, router=LeastLoaded())


def test_a_simulation_counts_what_any_session_had_before_and_sums_it_up_by_turn():
    """One prompt of 1,024 tokens, which goes for another context between its two uses."""
    sessions = [
        Session("a", (Turn((Span(1, 1024), Span(2, 64)), 8),), 0.0),
        Session("b", (Turn((Span(3, 2000),), 8),), 10.0),
        Session("c", (Turn((Span(1, 1024), Span(4, 64)), 8),), 20.0),
    ]
    outcome = Simulator(make_cluster(), sessions, oracle=Oracle(sessions, 64)).run(1e9)
    rows = sorted(outcome.turns, key=lambda row: row.sent_s)
    assert [row.num_known_tokens for row in rows] == [0, 0, 1024]
    assert [row.num_recomputed_tokens > 0 for row in rows] == [False, False, True]
    replica, summary = outcome.replicas[0], outcome.summary()
    assert (replica.num_recomputed_tokens, replica.recompute_s) == (
        summary.num_recomputed_tokens,
        pytest.approx(summary.recompute_s),
    )
    assert outcome.summary(15.0).num_recomputed_tokens == summary.num_recomputed_tokens
    without = Simulator(make_cluster(), sessions).run(1e9).summary()
    assert without.num_recomputed_tokens == 0


def test_a_request_says_what_the_server_sees_and_what_it_is_told():
    turns = (Turn((Span(1, 64),), 8), Turn((Span(1, 64, 64),), 8, 1.0, "tool", "look_up"), Turn((Span(1, 9, 128),), 8))
    client = Client(Session("a", turns), 0)
    client.ask(0.0)
    assert client.request(64).reuse == Reuse(tool_class("look_up"))
    client.end_turn(client.request(64))
    client.ask(1.0)
    assert client.request(64).reuse == Reuse()
    cluster = make_cluster()
    core = cluster.make_core()
    cluster = Cluster(make_core=lambda: core, cost=cluster.cost, router=LeastLoaded())
    told = {0: Reuse(expected_use_s=5.0), 1: Reuse(expected_use_s=7.0), 2: Reuse(expected_use_s=math.inf)}
    Simulator(cluster, [Session("a", turns)], reuse_of=lambda session, number: told[number]).run(1e9)
    assert {chunk.reuse for chunk in core._cache.index} == {Reuse(expected_use_s=math.inf)}
