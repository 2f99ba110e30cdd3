"""Clients, replicas that come and go, links, and what is told of a run."""

import random
from dataclasses import replace

import pytest

from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.tier_table import TierSpec
from engine.errors import ConfigError
from engine.simulator.cluster import RETRY_AFTER_S, Change, Cluster, LinkSpec
from engine.simulator.devices import DEVICES, MODELS, Device, find_device, find_model
from engine.simulator.events import ARRIVAL, END_OF_STEP, Events
from engine.simulator.links import Link
from engine.simulator.outcome import Outcome
from engine.simulator.report import Result, format_csv, format_html, format_table
from engine.simulator.routing import LeastLoaded, PowerOfTwo, ReplicaState
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import Roofline, SeparateBatches, StepWork
from engine.workloads.arrivals import Poisson, arrange
from engine.workloads.session import Session, Span, Turn
from engine.workloads.sources import WorkloadOptions, load_workload

CHUNK_SIZE = 64
SHAPE = MODELS["opt-13b"]
COST = Roofline(SHAPE, DEVICES["a100-80gb"], SHAPE.kv_bytes_per_token * CHUNK_SIZE)


def make_cluster(num_replicas: int = 1, *, links=(), slow_tiers=(), num_cpu_blocks: int = 400, **options) -> Cluster:
    scheduling = {"max_model_len": 8192, "max_num_batched_tokens": 2048, "max_num_queued_reqs": 10_000}
    cluster_options = {name: options.pop(name) for name in ("router", "changes") if name in options}

    def make_core() -> EngineCore:
        return EngineCore(
            CacheConfig(
                chunk_size=CHUNK_SIZE,
                num_gpu_blocks=200,
                num_cpu_blocks=num_cpu_blocks,
                cost_model=COST.cost_model(CHUNK_SIZE),
                slow_tiers=slow_tiers,
            ),
            SchedulingConfig(**scheduling | options),
        )

    return Cluster(
        make_core=make_core,
        cost=COST,
        router=cluster_options.pop("router", None) or LeastLoaded(),
        num_replicas=num_replicas,
        bytes_per_block=SHAPE.kv_bytes_per_token * CHUNK_SIZE,
        links=links,
        **cluster_options,
    )


def chats(rate: float, num_sessions: int, seed: int = 0) -> list[Session]:
    return list(
        arrange(load_workload("sharegpt-like", WorkloadOptions(num_sessions=num_sessions, seed=seed)), Poisson(rate))
    )


def answered(outcome: Outcome) -> list[tuple[int, int]]:
    return sorted((row.session, row.number) for row in outcome.turns)


def test_a_slow_turn_delays_the_next():
    """Each turn is sent its pause after the end of the answer before."""
    turns = (Turn((Span(1, 100),), 50), Turn((Span(1, 20, 100),), 30, 2.5), Turn((Span(1, 20, 120),), 30, 0.0))
    rows = sorted(Simulator(make_cluster(), [Session("a", turns, 3.0)]).run(1e9).turns, key=lambda row: row.number)
    assert [row.sent_s for row in rows] == [3.0, rows[0].finished_s + 2.5, rows[1].finished_s]
    assert [row.num_output_tokens for row in rows] == [50, 30, 30]
    assert [row.num_prompt_tokens for row in rows] == [100, 170, 220]


def test_the_time_that_is_simulated_ends_where_it_is_told():
    outcome = Simulator(make_cluster(), chats(1.0, 200)).run(60.0)
    assert outcome.ended_s == 60.0
    assert 0 < outcome.num_unfinished < 64
    assert max(row.finished_s for row in outcome.turns) < 60.0


@pytest.mark.parametrize("what", ["lose", "drain"])
def test_every_turn_is_answered_once_whatever_replicas_do(what):
    sessions = chats(1.0, 60)
    changes = (Change(20.0, what, 1, restart_s=15.0), Change(30.0, "add"), Change(50.0, what, 0))
    outcome = Simulator(make_cluster(3, changes=changes), sessions).run(1e9)
    still = Simulator(make_cluster(3), sessions).run(1e9)
    assert answered(outcome) == answered(still)
    assert all(row.sent_s <= row.first_token_s <= row.finished_s for row in outcome.turns)
    assert outcome.num_unfinished == 0
    assert len(outcome.messages) >= 3
    assert outcome.summary().num_recomputed_tokens > still.summary().num_recomputed_tokens
    if what == "drain":
        assert not any(row.rank == 1 and row.sent_s > 20.0 and row.sent_s < 30.0 for row in outcome.turns)


def test_an_answer_that_was_begun_on_a_lost_replica_goes_on_elsewhere():
    session = Session("a", (Turn((Span(1, 200),), 400),))
    router = LeastLoaded()
    cluster = make_cluster(2, router=router, changes=(Change(3.0, "lose", 0, restart_s=1e6),))
    (row,) = Simulator(cluster, [session]).run(1e5).turns
    (alone,) = Simulator(make_cluster(1), [session]).run(1e5).turns
    assert (row.rank, row.num_output_tokens) == (1, 400)
    assert row.first_token_s == alone.first_token_s < 3.0
    # A second until the loss is noticed, a step that was lost, and what had been computed is computed again.
    assert 1.0 < row.finished_s - alone.finished_s < 1.3


def test_a_full_replica_refuses_and_the_client_asks_again():
    sessions = [Session(f"s{number}", (Turn((Span(number, 50),), 200),)) for number in range(6)]
    outcome = Simulator(make_cluster(max_num_seqs=1, max_num_queued_reqs=1), sessions).run(1e9)
    assert len(outcome.turns) == 6
    retries = [row.num_retries for row in outcome.turns]
    assert sum(retries) == outcome.num_refused > 0
    assert all(row.finished_s - row.sent_s >= row.num_retries * RETRY_AFTER_S for row in outcome.turns)


def test_a_turn_that_does_not_fit_the_window_ends_its_session():
    sessions = [Session("long", (Turn((Span(1, 9000),), 10),)), Session("short", (Turn((Span(2, 90),), 10),))]
    outcome = Simulator(make_cluster(), sessions).run(1e9)
    assert (len(outcome.turns), outcome.num_too_long) == (1, 1)


def test_transfers_of_a_slow_tier_take_the_time_of_its_link():
    disk = TierSpec(name="disk", num_blocks=4000, is_fast=False, stores_first_use=True)
    sessions = chats(1.5, 150)
    runs = [
        Simulator(
            make_cluster(num_cpu_blocks=100, slow_tiers=(disk,), links=(("disk", LinkSpec(rate, rate)),)), sessions
        ).run(400.0)
        for rate in (20e9, 10e9, 1e9)
    ]
    counters = [run.replicas[0].counters for run in runs]
    num_loaded = [each["slow_transfers"]["disk_loaded"] for each in counters]
    assert min(num_loaded[:2]) > 20
    assert num_loaded[2] < 20, "computing is cheaper"
    for each, num, rate in zip(counters[:2], num_loaded, (20e9, 10e9), strict=False):
        assert each["slow_seconds"]["disk_loaded"] == pytest.approx(num * SHAPE.kv_bytes_per_token * CHUNK_SIZE / rate)


def test_a_link_carries_one_after_the_other():
    link = Link(100.0, latency_s=1.0)
    assert [link.send(50, 0.0), link.send(50, 0.0), link.send(100, 7.0)] == [1.5, 2.0, 9.0]


def test_events_come_in_order_of_time_then_kind_then_arrival():
    events, seen = Events(), []
    for time_s, kind, name in [
        (2.0, END_OF_STEP, "a"),
        (2.0, ARRIVAL, "b"),
        (1.0, END_OF_STEP, "c"),
        (2.0, ARRIVAL, "d"),
    ]:
        events.add(time_s, kind, lambda now, name: seen.append((now, name)), name)
    while events.run_next(2.5) is not None:
        pass
    assert seen == [(1.0, "c"), (2.0, "b"), (2.0, "d"), (2.0, "a")]
    assert events.run_next(2.5) is None


def states(**num_requests: int) -> dict[int, ReplicaState]:
    return {int(name[1:]): ReplicaState(0, num, 0, 0, 8, None, None) for name, num in num_requests.items()}


def test_routers_send_where_they_say():
    news = states(r0=5, r1=1, r2=3)
    table = LeastLoaded()
    table.hear(news, 0.0)
    assert table.place("a", True, (0, 1, 2)) == [1]
    table.hear(states(r0=0, r1=9, r2=0), 0.5)
    assert table.another().place("a", False, (0, 1, 2)) == [1], "all ingresses share the table"
    assert table.place("a", False, (0, 2)) == [0], "its replica has gone"
    assert table.next_home("a", (1, 2)) == table.place("a", False, (1, 2))[0] == 2
    table.forget("a")
    table.hear(states(r0=0, r1=9, r2=0), 1.0)
    assert table.place("a", True, (0, 1, 2)) == [0]
    assert table.place("b", True, (0, 1, 2)) == [2], "what was sent since the news counts"
    drawn = set()
    for seed in range(20):
        router = PowerOfTwo(seed)
        router.hear(news, 0.0)
        drawn.add(router.place("a", True, (0, 1, 2))[0])
    assert drawn == {1, 2}, "the most loaded one is never the better of two"
    others = [PowerOfTwo(1).another(), PowerOfTwo(1).another()]
    draws = [[other.place("a", True, tuple(range(9))) for _ in range(9)] for other in others]
    assert draws[0] == draws[1] != [PowerOfTwo(1).place("a", True, tuple(range(9))) for _ in range(9)]


def test_the_same_seed_gives_the_same_run():
    runs = [Simulator(make_cluster(2, router=PowerOfTwo(1)), chats(1.0, 40, seed=3)).run(1e9) for _ in range(2)]
    assert list(runs[0].turns) == list(runs[1].turns)


def test_memory_of_a_turn_is_bounded():
    """A column for each number, not an object for each turn."""
    turns = Simulator(make_cluster(), chats(1.0, 30)).run(1e9).turns
    assert all(column.itemsize == 8 for column in turns._columns)


# -- what is told ------------------------------------------------------------------------------------------------------


def test_the_summary_is_that_of_its_rows():
    outcome = Simulator(make_cluster(), chats(1.0, 60)).run(1e9)
    rows = [row for row in outcome.turns if row.sent_s >= 10.0]
    summary = outcome.summary(10.0)
    latencies = sorted((row.finished_s - row.sent_s) / row.num_output_tokens for row in rows)
    assert summary.num_turns == len(rows)
    assert summary.s_per_token_mean == pytest.approx(sum(latencies) / len(rows))
    assert latencies[len(rows) // 2 - 1] <= summary.s_per_token_p50 <= latencies[len(rows) // 2 + 1]
    known = sum(row.num_known_tokens for row in rows)
    found = sum(min(row.num_cached_tokens, row.num_known_tokens) for row in rows)
    assert summary.hit_rate == pytest.approx(found / known)
    assert 0.5 < summary.hit_rate < 1.0, "the last token of an answer is never computed"
    assert 0 < summary.busy <= 1
    with pytest.raises(ValueError, match="longer"):
        outcome.summary(1e12)


def test_balance_is_of_open_requests_after_the_warm_up():
    outcome = Simulator(make_cluster(), chats(1.0, 3)).run(1e9)
    loads = [(0.0, {0: 90, 1: 0}), (1.0, {0: 2, 1: 4}), (2.0, {0: 4, 1: 4}), (3.0, {1: 4, 2: 2})]
    assert replace(outcome, loads=loads).summary(0.5).requests_balance == pytest.approx(4 / 3)
    assert replace(outcome, loads=()).summary().requests_balance == 1.0


def test_reports_have_every_case_and_need_nothing_else():
    outcome = Simulator(make_cluster(), chats(1.0, 30)).run(1e9)
    summaries = [outcome.summary(), outcome.summary(5.0)]
    results = [Result(f"rate {rate} <b>", summaries, "group", rate) for rate in (1.0, 2.0)]
    table, page = format_table(results), format_html("title & more", [("what", "a < b")], results)
    assert [len(line.split("\n")) for line in (table, format_csv(results, [0, 1]).strip())] == [3, 5]
    assert page.count("<svg") == 4
    assert "rate 1.0 &lt;b&gt;" in page
    assert "<b>" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert results[0].spread("turns_per_s") > 0
    assert Result("one", summaries[:1]).spread("turns_per_s") == 0


def test_models_and_devices_by_name_or_by_figures():
    assert find_model("opt-13b").kv_bytes_per_token == 819_200
    assert find_model("opt-66b").kv_bytes_per_token == 2_359_296
    assert find_model("llama-2-13b-gqa").kv_bytes_per_token == 204_800
    assert find_model("llama-2-70b").kv_bytes_per_token == 327_680
    fast = find_device({"base": "a100-80gb", "host_to_device": 5e10})
    assert (fast.host_to_device, fast.flops_per_s) == (5e10, DEVICES["a100-80gb"].flops_per_s)
    for value in ("tpu", {"flops": 1.0}, {"flops_per_s": -1.0}, {"flops_per_s": 1e12}):
        with pytest.raises(ConfigError) as raised:
            find_device(value)
        assert raised.value.param == "device"


def test_a_step_costs_what_figure_3_shows_of_the_a100():
    """The paper's prefill of 32 prompts of 4096 tokens, and its 200 decodes of 32 requests; read off the plot."""
    prefill_s = sum(
        COST.step_time(StepWork(num_prompt_tokens=2048, num_prompt_pairs=2048 * start + 2048 * 2049 // 2))
        for start in (0, 2048)
        for _ in range(32)
    )
    assert prefill_s == pytest.approx(21.4, rel=0.25)
    for history, seconds in ((128, 4.9), (1024, 7.8), (2048, 11.1), (4096, 17.6)):
        decode_s = sum(COST.step_time(StepWork(32, 32 * (history + number))) for number in range(200))
        assert decode_s == pytest.approx(seconds, rel=0.15)


def test_a_step_waits_for_the_sums_between_devices_and_for_each_request_that_decodes():
    device = DEVICES["a100-80gb"]
    four = replace(device, num_devices=4)
    work = StepWork(num_decodes=10, decode_context_len=1000)

    def time_of(device: Device) -> float:
        return Roofline(SHAPE, device, 1.0).step_time(work)

    # 40 layers sum up 10 tokens of 5120 values of 2 bytes twice each; 3/4 of it is sent twice.
    summed_s = 40 * 2 * 10 * 5120 * 2 * 1.5 / 25e9
    assert time_of(replace(four, interconnect_bytes_per_s=25e9)) == pytest.approx(time_of(four) + summed_s)
    assert time_of(replace(device, interconnect_bytes_per_s=25e9)) == time_of(device)
    assert time_of(replace(device, decode_overhead_s=0.001)) == pytest.approx(time_of(device) + 0.01)


def test_separate_batches_take_the_time_of_a_step_of_prompts_and_of_one_of_decodes():
    separate = SeparateBatches(COST)
    decodes = StepWork(num_decodes=8, decode_context_len=4096)
    prompts = StepWork(num_prompt_tokens=256, num_prompt_pairs=33_000, num_swap_ins=4, num_evictions=2, num_starts=1)
    both = prompts._replace(num_decodes=8, decode_context_len=4096)
    for one in (decodes, prompts):
        assert separate.step_time(one) == COST.step_time(one)
    assert separate.step_time(both) == pytest.approx(COST.step_time(prompts) + COST.step_time(decodes))
    # Weights are read twice, which is what one batch saves.
    assert separate.step_time(both) - COST.step_time(both) > 0.9 * COST.overhead_s
    assert separate.cost_model(32) == COST.cost_model(32)


def test_a_workload_that_is_endless_is_drawn_as_it_is_needed():
    rng = random.Random(0)

    def endless():
        number = 0
        while True:
            yield Session(f"s{number}", (Turn((Span(number, rng.randint(1, 90)),), 5),), start_s=float(number))
            number += 1

    outcome = Simulator(make_cluster(), endless()).run(50.0)
    assert len(outcome.turns) == 50
