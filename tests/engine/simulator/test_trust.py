"""Times of the simulator follow from closed forms."""

import random

import pytest

from engine.simulator.simulator import Simulator
from engine.workloads.session import Session, Span, Turn
from engine.workloads.sources import WorkloadOptions, load_workload
from tests.engine.simulator.small_cluster import CHUNK_SIZE, make_cluster, one_turn
from tests.nightly import nightly


def decode_s(first_context_len: int, num_steps: int) -> float:
    """So many steps of a lone request, whose first one attends to `first_context_len` tokens."""
    sum_of_lens = num_steps * first_context_len + num_steps * (num_steps - 1) / 2
    weights_s = 1e9 * 2 / (1e12 * 0.5)
    kv_s = 2 * 10 * 16 * 64 * 2 / (1e12 * 0.5)
    return num_steps * (0.001 + weights_s) + sum_of_lens * kv_s


def prompt_s(start: int, num_tokens: int) -> float:
    """A step that computes so many tokens behind a context of `start`, without its overhead."""
    num_pairs = num_tokens * start + num_tokens * (num_tokens + 1) / 2
    return max(2e9 / 5e11, num_tokens * 2e9 / 5e13) + num_pairs * 4 * 10 * 16 * 64 / 1e13


def test_one_conversation_in_two_tiers():
    """Its second turn finds what it left in the CPU tier, because another one took the whole GPU tier meanwhile."""
    block_s = 2 * 10 * 16 * 64 * 2 * CHUNK_SIZE / 2e9
    first = Session("a", (Turn((Span(1, 480),), 33), Turn((Span(1, 64, 480),), 33, 10.0)))
    other = one_turn("b", 2, 5.0, 64 * CHUNK_SIZE - 8, 1)
    simulator = Simulator(make_cluster(max_num_batched_tokens=1024), [first, other])
    turns = {(row.session, row.number): row for row in simulator.run(1e9).turns}
    (one, two) = (row for (session, _), row in turns.items() if session == min(s for s, _ in turns))
    assert one.first_token_s == pytest.approx(0.001 + prompt_s(0, 480), rel=0.01)
    assert one.finished_s - one.first_token_s == pytest.approx(decode_s(481, 32), rel=0.01)
    # 512 tokens of the first turn are cached, 32 blocks; what follows was sampled last or is new
    assert (two.num_cached_tokens, two.num_loaded_tokens) == (512, 512)
    computed_s = prompt_s(512, 65)
    loaded_s = max(computed_s, 32 * block_s + computed_s / 10)
    assert loaded_s > computed_s
    # of the other one's 64 blocks, 16 were copied ahead of time; it takes 37
    evicted_s = (37 - 16) * block_s * 2e9 / 1e10
    assert two.first_token_s - two.sent_s == pytest.approx(0.001 + evicted_s + loaded_s, rel=0.01)


def single_requests(num: int, rate: float, seed: int) -> tuple[list[Session], list[float]]:
    rng = random.Random(seed)
    now, starts = 0.0, []
    for _ in range(num):
        now += rng.expovariate(rate)
        starts.append(now)
    return [one_turn(f"s{number}", number, start_s, 16, 1) for number, start_s in enumerate(starts)], starts


def waits_of(num: int, load: float, seed: int) -> tuple[list[float], list[float], float]:
    """(simulated waits, those by Lindley's recursion, seconds of service) of one server with a queue."""
    service_s = 0.001 + prompt_s(0, 16)
    sessions, starts = single_requests(num, load / service_s, seed)
    outcome = Simulator(make_cluster(num_cpu_blocks=0, max_num_seqs=1, keep=False), sessions).run(1e9)
    waits, free_at_s = [], 0.0
    for start_s in starts:
        waits.append(max(0.0, free_at_s - start_s))
        free_at_s = max(free_at_s, start_s) + service_s
    rows = sorted(outcome.turns, key=lambda row: row.sent_s)
    return [row.finished_s - row.sent_s - service_s for row in rows], waits, service_s


def test_a_queue_before_one_replica_is_that_of_one_server():
    simulated, expected, _ = waits_of(1500, 0.8, seed=1)
    assert simulated == pytest.approx(expected, abs=1e-9)
    assert sum(expected) > 0


@nightly
def test_the_mean_wait_is_that_of_an_m_d_1_queue():
    """Half a service at a load of one half (Pollaczek and Khinchine)."""
    simulated, _, service_s = waits_of(200_000, 0.5, seed=2)
    assert sum(simulated) / len(simulated) == pytest.approx(0.5 * service_s / (2 * (1 - 0.5)), rel=0.01)


def test_a_workload_of_conversations_ends():
    """Everything that was asked is answered, once, and nothing is left running."""
    sessions = load_workload("synthetic", WorkloadOptions(num_sessions=20))
    outcome = Simulator(make_cluster(), sessions, num_active=4).run(1e9)
    assert len(outcome.turns) == sum(len(session.turns) for session in sessions)
    assert (outcome.num_unfinished, outcome.num_refused, outcome.num_too_long) == (0, 0, 0)
