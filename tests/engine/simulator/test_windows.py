"""A cluster in windows: the same figures with any number of groups, and those without windows as long as it is exact."""

from functools import partial

import pytest

from deployments.simulated_routing import Affinity, PriceOfMoving
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.tier_table import TierSpec
from engine.errors import ConfigError
from engine.simulator.cluster import LOADS_PERIOD_S, Change, Cluster, LinkSpec
from engine.simulator.devices import DEVICES, MODELS
from engine.simulator.network import NetworkSpec
from engine.simulator.outcome import Outcome
from engine.simulator.routing import LeastLoaded, PowerOfTwo
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import Roofline
from engine.simulator.windows import WindowedSimulator
from engine.workloads.arrivals import Poisson, arrange
from engine.workloads.session import Session, Span, Turn
from engine.workloads.sources import load_workload, parse_options

CHUNK_SIZE = 64
SHAPE = MODELS["opt-13b"]
BYTES_PER_BLOCK = SHAPE.kv_bytes_per_token * CHUNK_SIZE
COST = Roofline(SHAPE, DEVICES["a100-80gb"], BYTES_PER_BLOCK)
CHANGES = (
    Change(15.2, "lose", 1, restart_s=9.0),
    Change(24.1, "drain", 0),
    Change(26.0, "add"),
    Change(27.0, "add", start_s=5.3),
    Change(30.0, "drain", 7),
)


def make_cluster(
    num_replicas: int, router=None, *, max_num_seqs=64, max_num_queued_reqs=1000, slow=(), **options
) -> Cluster:
    cache = CacheConfig(
        chunk_size=CHUNK_SIZE,
        num_gpu_blocks=200,
        num_cpu_blocks=400,
        cost_model=COST.cost_model(CHUNK_SIZE),
        slow_tiers=slow,
    )
    scheduling = SchedulingConfig(
        max_model_len=8192,
        max_num_batched_tokens=2048,
        max_num_seqs=max_num_seqs,
        max_num_queued_reqs=max_num_queued_reqs,
    )
    return Cluster(
        make_core=partial(EngineCore, cache, scheduling),
        cost=COST,
        router=router or Affinity(1, of_two=False),
        num_replicas=num_replicas,
        bytes_per_block=BYTES_PER_BLOCK,
        **options,
    )


def chats(rate: float, num_sessions: int, think_s: str = "exponential:mean=4") -> list[Session]:
    options = parse_options({"num_sessions": num_sessions, "seed": 3, "think_s": think_s})
    return list(arrange(load_workload("sharegpt-like", options), Poisson(rate)))


def in_windows(cluster: Cluster, sessions: list[Session], num_groups: int, until_s: float = 40.0, **options) -> Outcome:
    return WindowedSimulator(cluster, sessions, num_groups=num_groups, **options).run(until_s)


def figures(outcome: Outcome) -> tuple:
    return (
        list(outcome.turns),
        [(row, row.counters) for row in outcome.replicas],
        outcome.loads,
        outcome.ended_s,
        outcome.num_unfinished,
        outcome.num_refused,
        outcome.num_too_long,
        outcome.messages,
    )


ROUTERS = {
    "affinity": lambda: Affinity(1, of_two=False),
    "affinity_of_two": lambda: Affinity(1, of_two=True),
    "price_of_moving": lambda: PriceOfMoving(1, of_two=False),
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
}


@pytest.mark.parametrize("name", ROUTERS)
def test_any_number_of_groups_gives_the_same_figures(name):
    """With replicas that are full, lost, drained and added, and with pauses shorter than a window."""
    sessions = chats(6.0, 200, "exponential:mean=1")
    disk = TierSpec(name="disk", num_blocks=300, is_fast=False, max_wait_s=5.0)

    def run(num_groups: int) -> Outcome:
        cluster = make_cluster(
            3,
            ROUTERS[name](),
            max_num_seqs=12,
            max_num_queued_reqs=4,
            slow=(disk,),
            links=(("disk", LinkSpec(2e9, 1e9)),),
            changes=CHANGES,
            drain_s=3.0,
            num_ingresses=2,
        )
        return in_windows(cluster, sessions, num_groups, in_processes=False)

    outcome = run(1)
    assert len(outcome.turns) > 150
    assert outcome.num_refused > 20
    assert {row.rank for row in outcome.replicas} == {0, 1, 2, 3}
    assert figures(run(3)) == figures(outcome)


def test_any_number_of_processes_gives_the_same_figures():
    sessions = chats(3.0, 120, "exponential:mean=2")

    def run(num_groups: int, *, in_processes: bool = True) -> Outcome:
        cluster = make_cluster(3, LeastLoaded(), changes=(Change(12.0, "lose", 1), Change(20.0, "drain", 0)))
        return in_windows(cluster, sessions, num_groups, 40.0, in_processes=in_processes)

    outcome = run(1, in_processes=False)
    assert len(outcome.turns) > 80
    for num_processes in (2, 3):
        assert figures(run(num_processes)) == figures(outcome)


@pytest.mark.parametrize(
    ("think_s", "changes"),
    [
        ("exponential:mean=0.2", ()),
        ("uniform:min=0.6,max=9", (Change(25.0, "lose", 1, restart_s=10.0), Change(40.2, "drain", 0))),
    ],
    ids=["soon again", "lost"],
)
def test_windows_change_nothing_where_they_are_exact(think_s, changes):
    """Turns are sent at their times, however soon they follow, and those of a lost replica as soon as without windows."""
    sessions = chats(2.0, 100, think_s)

    def rows(simulator: Simulator) -> list:
        return sorted(simulator.run(60.0).turns)

    expected = rows(Simulator(make_cluster(3, changes=changes), sessions))
    assert len(expected) > 100
    assert any(row.is_moved for row in expected) == bool(changes)
    windowed = WindowedSimulator(make_cluster(3, changes=changes), sessions, num_groups=2, in_processes=False)
    assert rows(windowed) == expected


def test_what_moves_within_a_window_is_late_by_less_than_one():
    turns = (Turn((Span(1, 100),), 20), Turn((Span(1, 20, 100),), 20, 0.01))

    class Alternating(PowerOfTwo):
        def place(self, session_id, is_first_turn, ranks):
            return [ranks[0 if is_first_turn else -1]]

    def rows(simulator: Simulator) -> list:
        return sorted(simulator.run(1e9).turns, key=lambda row: row.number)

    session = Session("a", turns, 0.1)
    expected = rows(Simulator(make_cluster(2, Alternating()), [session]))
    first, second = rows(WindowedSimulator(make_cluster(2, Alternating()), [session], num_groups=2, in_processes=False))
    assert (first, second.rank) == (expected[0], 1)
    assert second.sent_s == -(-expected[1].sent_s // LOADS_PERIOD_S) * LOADS_PERIOD_S
    assert second.finished_s - second.sent_s == pytest.approx(expected[1].finished_s - expected[1].sent_s)


def test_a_simulation_in_windows_ends_with_the_last_turn():
    session = Session("a", (Turn((Span(1, 100),), 20),), 3.3)
    outcome = in_windows(make_cluster(2), [session], 2, 1e9, in_processes=False)
    assert outcome.ended_s == next(iter(outcome.turns)).finished_s
    assert [row.ended_s for row in outcome.replicas] == [outcome.ended_s] * 2


def test_replicas_that_hand_over_are_refused():
    with pytest.raises(ConfigError, match="kv_handover: off"):
        WindowedSimulator(make_cluster(2, network=NetworkSpec(bytes_per_s=1e9)), [], num_groups=2)
