"""The simulator makes the plans that the live loop makes, step by step."""

import heapq
import random
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest

from engine.core.engine_core import RequestOutput
from engine.core.plan import SlowTransfer, StepPlan, StepResult, TransferEnd
from engine.core.request import Request
from engine.simulator.clients import Client
from engine.simulator.cluster import Cluster
from engine.simulator.links import Link
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import StepWork
from engine.step_loop import LookAhead, StepLoop
from engine.workloads.arrivals import Poisson, arrange
from engine.workloads.distributions import Constant, Exponential, Lognormal
from engine.workloads.session import Session
from engine.workloads.sources import WorkloadOptions, load_workload
from engine.workloads.synthetic import ToolUse
from tests.engine.simulator.small_cluster import CHUNK_SIZE, COST, chats, make_cluster, one_turn


class LiveLoop:
    """The engine's own loop with an executor and a transport that only let time pass, and clients as Simulator's.

    Requests that are sent while a step is computed reach the core before its result, as in an engine that overlaps steps.

    plans: each with its time. requests: all that there were.
    """

    max_steps_in_flight = 1

    def __init__(self, cluster: Cluster, sessions: list[Session]) -> None:
        self.now = 0.0
        self.plans: list[tuple[StepPlan, float]] = []
        self.requests: dict[str, Request] = {}
        self.core = cluster.make_core()
        self._bytes_per_block = cluster.bytes_per_block
        self._links = {
            name: (Link(spec.read_bytes_per_s, spec.latency_s), Link(spec.write_bytes_per_s, spec.latency_s))
            for name, spec in cluster.links
        }
        self._transfers: list[tuple[float, int, TransferEnd]] = []
        self._loop = StepLoop(self.core, self, self, lambda: self.now, LookAhead.NOTHING, transport=self)
        self._clients = {session.session_id: Client(session, number) for number, session in enumerate(sessions)}
        self._arrivals = [(session.start_s, number, session.session_id) for number, session in enumerate(sessions)]
        self._num_arrivals = len(sessions)

    def run(self) -> None:
        while self._arrivals or self.core.has_requests:
            self._take_arrivals()
            if self._loop.step() is None:
                next_s = [events[0][0] for events in (self._arrivals, self._transfers) if events]
                deadline_s = self.core.next_deadline_s()
                if next_s or deadline_s is not None:
                    self.now = max(self.now, min([*next_s, *([] if deadline_s is None else [deadline_s])]))

    def _take_arrivals(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.now:
            time_s, _, name = heapq.heappop(self._arrivals)
            self._clients[name].ask(time_s)
            request = self._clients[name].request(CHUNK_SIZE)
            self.requests[request.request_id] = request
            assert not self.core.add_request(request, time_s)

    # what StepLoop takes for its executor

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append((plan, self.now))
        self.now += COST.step_time(StepWork.of(plan))
        self._take_arrivals()
        tokens = [self._client(segment.request_id).token for segment in plan.segments if segment.samples]
        return StepResult(plan.step_id, tuple(tokens))

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        raise AssertionError("nothing is launched ahead")

    def check_health(self) -> None:
        pass

    # for its transport

    def start(self, transfer: SlowTransfer) -> None:
        is_load = transfer.copy.source_tier in self._links
        link = self._links[transfer.copy.source_tier][0] if is_load else self._links[transfer.copy.target_tier][1]
        began_s = max(self.now, link.free_at_s)
        end_s = link.send(self._bytes_per_block, self.now)
        end = TransferEnd(transfer.transfer_id, True, end_s - began_s)
        heapq.heappush(self._transfers, (end_s, transfer.transfer_id, end))

    def poll(self) -> Iterator[TransferEnd]:
        while self._transfers and self._transfers[0][0] <= self.now:
            yield heapq.heappop(self._transfers)[2]

    # and for its outputs

    def add(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            client = self._client(output.request_id)
            if output.finish_reason is not None and client.end_turn(self.requests[output.request_id]):
                self._num_arrivals += 1
                arrival = (self.now + client.turn.pause_s, self._num_arrivals, client.session.session_id)
                heapq.heappush(self._arrivals, arrival)

    def deliver(self) -> None:
        pass

    def fail(self, request_ids, error) -> None:
        raise error

    def _client(self, request_id: str) -> Client:
        return self._clients[request_id.rpartition(".")[0]]


def long_answers(seed: int) -> list[Session]:
    """More than the GPU tier holds, all begun when there was still room."""
    rng = random.Random(f"long.{seed}")
    return [one_turn(f"s{number}", number, 0.02 * number, 20, rng.randint(60, 150)) for number in range(40)]


def of_tenants(seed: int) -> list[Session]:
    """One sends much more than the other two."""
    rng = random.Random(f"tenants.{seed}")
    return [replace(session, tenant=rng.choice("aaaaaabc")) for session in chats(seed)]


def of_agents(seed: int) -> list[Session]:
    """Most of their turns are results of tools, which run for a moment, or for longer than the clock's steps."""
    tools = (
        ToolUse("search", 0.5, Exponential(0.3), Lognormal(40, 0.5)),
        ToolUse("clock", 0.3, Constant(0), Constant(3)),
    )
    options = WorkloadOptions(num_sessions=15, turns=Lognormal(6, 0.5), tools=tools, max_context_len=600, seed=seed)
    return list(arrange(load_workload("synthetic", options), Poisson(8.0), seed))


# By name: sessions, options of the cluster, and what has to be seen of it in the core's counters.
SCENES = {
    "two tiers": (chats, {}, lambda seen: seen["num_swap_ins"] > 10),
    "three tiers": (
        chats,
        {"num_cpu_blocks": 48, "disk": 400},
        lambda seen: min(seen["slow_transfers"][f"disk_{what}"] for what in ("loaded", "stored")) > 10,
    ),
    "suspension": (long_answers, {"num_gpu_blocks": 32}, lambda seen: seen["num_suspensions"] > 3),
    "tenants": (of_tenants, {"num_gpu_blocks": 32, "max_num_seqs": 3}, lambda seen: seen["num_gave_way"] > 0),
    "tools": (of_agents, {}, lambda seen: seen["num_finished"] > 50),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scene", SCENES)
def test_the_plans_are_those_of_the_live_loop(scene, seed):
    """Step by step, with their times."""
    make_sessions, options, is_seen = SCENES[scene]
    cluster, sessions = make_cluster(**options), make_sessions(seed)
    live = LiveLoop(cluster, sessions)
    live.run()
    plans: list[tuple[StepPlan, float]] = []
    outcome = Simulator(cluster, sessions, on_plan=lambda plan, now: plans.append((plan, now))).run(1e9)
    assert len(plans) > 300
    assert plans == live.plans
    counters = outcome.replicas[0].counters
    assert counters == live.core.get_statistics()
    assert is_seen(counters)


@pytest.mark.parametrize("seed", range(4))
def test_steps_that_are_applied_at_once_change_nothing(seed):
    """Each turn's times and counts, and each replica's counters and time."""
    sessions = chats(seed)
    runs = [Simulator(make_cluster(), sessions, on_plan=on_plan).run(1e9) for on_plan in (None, lambda plan, now: None)]
    assert list(runs[0].turns) == list(runs[1].turns)
    for left, right in zip(runs[0].replicas, runs[1].replicas, strict=True):
        assert left.counters == right.counters
        assert (left.busy_s, left.recompute_s) == (pytest.approx(right.busy_s), right.recompute_s)
