"""Simulated hand-over is that of the live loop: the same plans, records and transfers, at the same times."""

import heapq
import itertools
import random
from concurrent.futures import Future
from dataclasses import replace

import pytest

from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.handover import records_of
from engine.core.plan import SlowTransfer, StepPlan, StepResult, TransferEnd
from engine.core.tier_table import PEER
from engine.simulator.clients import Client
from engine.simulator.directory import Directory
from engine.simulator.links import Link
from engine.simulator.network import NetworkSpec
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import StepWork
from engine.step_loop import LookAhead, StepLoop
from engine.workloads.session import Session, Span, Turn
from tests.engine.simulator.test_handover import BYTES_PER_BLOCK, CHUNK_SIZE, COST, Scripted, make_cluster

NETWORK = NetworkSpec(bytes_per_s=25e9, latency_s=0.002)
ARRIVAL, END_OF_TRANSFER = range(2)


class LiveEngine:
    """StepLoop around one core, with an executor that only lets time pass, and a transport of its own for peers."""

    max_steps_in_flight = 1

    def __init__(self, rank: int, core: EngineCore, cluster: "LiveCluster") -> None:
        self.rank, self.core, self.cluster = rank, core, cluster
        self.now = 0.0
        self.is_awake = False
        self.plans: list[tuple[StepPlan, float]] = []
        self.transfers: list[tuple[SlowTransfer, float]] = []
        self.clients: dict[str, Client] = {}
        self.requests = {}
        self.loop = StepLoop(core, self, self, lambda: self.now, LookAhead.NOTHING, self, self)
        self._out, self._into = (Link(NETWORK.bytes_per_s) for _ in range(2))
        self._ended: list[TransferEnd] = []
        self._pulls: dict[bytes, tuple[SlowTransfer, float]] = {}
        self._last_pull_s = 0.0
        self._wanted_s: dict[bytes, float] = {}

    def step(self) -> None:
        if self.loop.step() is None:
            self.is_awake = False
            pause_s = self.loop.max_pause_s()
            if pause_s is not None:
                self.cluster.add(self.now + pause_s, ARRIVAL, self, lambda now: None)

    def wake(self, now: float) -> None:
        if not self.is_awake:
            self.is_awake, self.now = True, max(self.now, now)

    @property
    def other(self) -> "LiveEngine":
        return self.cluster.engines[1 - self.rank]

    # -- requests

    def ask(self, client: Client, now: float) -> None:
        """A turn has come."""
        client.ask(now)
        request = client.request(CHUNK_SIZE)
        self.clients[request.request_id], self.requests[request.request_id] = client, request
        best = self.cluster.directory.best(request.conversation_id, self.rank, now)
        query = None if best is None else self.core.handover.missing_chunks(request)
        if query is None or query.first_position * CHUNK_SIZE >= best[1]:
            self.core.add_request(request, now)
            return

        def find(now: float) -> None:
            found = self.other.core.handover.find_chunks(query.keys, now)
            self.cluster.add(now + NETWORK.latency_s, ARRIVAL, self, lambda now: add(found, now))

        def add(found, now: float) -> None:
            records = records_of(query, found, request, CHUNK_SIZE)
            self.core.add_request(request, now)
            self.core.handover.expect(records, request.request_id, now)

        self.cluster.add(now + NETWORK.latency_s, ARRIVAL, None, find)

    def add(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.finish_reason is None:
                continue
            client, request = self.clients[output.request_id], self.requests[output.request_id]
            self.cluster.directory.note(request.conversation_id, self.rank, request.num_tokens, self.now)
            if client.end_turn(request):
                self.cluster.send(client, self.now + client.turn.pause_s)

    def deliver(self) -> None:
        pass

    def fail(self, request_ids, error) -> None:
        raise error

    # -- the executor

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append((plan, self.now))
        self.now += COST.step_time(StepWork.of(plan))
        return StepResult(plan.step_id, tuple(self.clients[s.request_id].token for s in plan.segments if s.samples))

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        raise AssertionError("nothing is launched ahead")

    def check_health(self) -> None:
        pass

    # -- peers

    def start(self, transfer: SlowTransfer) -> None:
        self.transfers.append((transfer, self.now))
        if transfer.copy.target_tier != PEER:
            self._pulls[transfer.key] = transfer, self.now
            self.cluster.add(
                self.now + NETWORK.latency_s,
                ARRIVAL,
                self.other,
                lambda now: self.other.want(transfer.key, now),
            )
            return
        waited_s = self.now - self._wanted_s.pop(transfer.key)
        begins_s = max(self.now, self._out.free_at_s)
        ends_s = self._out.send(BYTES_PER_BLOCK, self.now)
        self.cluster.add(
            begins_s + NETWORK.latency_s,
            ARRIVAL,
            None,
            lambda now: self.other.receive(transfer.key, now, ends_s + NETWORK.latency_s, waited_s),
        )
        self.end_at(ends_s, lambda now: TransferEnd(transfer.transfer_id, True))

    def want(self, key: bytes, now: float) -> None:
        self._wanted_s[key] = now
        self.core.handover.start_sends([key], now)

    def receive(self, key: bytes, begins_s: float, ends_s: float, waited_s: float) -> None:
        transfer, since_s = self._pulls.pop(key)

        def end(now: float) -> TransferEnd:
            seconds = now - max(since_s + waited_s, self._last_pull_s)
            self._last_pull_s = now
            return TransferEnd(transfer.transfer_id, True, seconds)

        self.end_at(self._into.receive(BYTES_PER_BLOCK, begins_s, ends_s), end)

    def end_at(self, time_s: float, end) -> None:
        self.cluster.add(time_s, END_OF_TRANSFER, self, lambda now: self._ended.append(end(now)))

    def poll(self) -> list[TransferEnd]:
        ended, self._ended = self._ended, []
        return ended

    def decline(self, keys) -> None:
        raise AssertionError("nothing is declined in this trace")

    def end_offers(self, offer_ids) -> None:
        raise AssertionError("nothing is offered")


class LiveCluster:
    """Two engines; what happens to each comes before the next step that begins then or later."""

    def __init__(self, make_core, sessions: list[Session]) -> None:
        self.directory = Directory()
        self.engines = [LiveEngine(rank, make_core(), self) for rank in range(2)]
        self._heap: list = []
        self._numbers = itertools.count()
        for index, session in enumerate(sessions):
            self.send(Client(session, index), session.start_s)

    def add(self, time_s: float, kind: int, owner: LiveEngine | None, call) -> None:
        heapq.heappush(self._heap, (time_s, kind, next(self._numbers), owner, call))

    def send(self, client: Client, time_s: float) -> None:
        """To one and the other in turn."""
        engine = self.engines[client.number % 2]
        self.add(time_s, ARRIVAL, engine, lambda now: engine.ask(client, now))

    def run(self) -> None:
        while True:
            awake = min((each for each in self.engines if each.is_awake), key=lambda each: each.now, default=None)
            if self._heap and (awake is None or self._heap[0][0] <= awake.now):
                time_s, _, _, owner, call = heapq.heappop(self._heap)
                call(time_s)
                if owner is not None:
                    owner.wake(time_s)
            elif awake is not None:
                awake.step()
            else:
                return


def without_places(transfers: list[tuple[SlowTransfer, float]]) -> list[tuple[SlowTransfer, float]]:
    """Places in the tier of peers are no memory, and their numbers depend on what else has ended in the middle of a step."""

    def without_place(transfer: SlowTransfer) -> SlowTransfer:
        copy = transfer.copy
        is_send = copy.target_tier == PEER
        return replace(transfer, copy=copy._replace(target=-1) if is_send else copy._replace(source=-1))

    return [(without_place(transfer), now) for transfer, now in transfers]


def chats(seed: int) -> list[Session]:
    rng = random.Random(seed)
    return [
        Session(
            f"s{number}",
            tuple(
                Turn((Span(number + 1, rng.randint(300, 1500), 2000 * index),), rng.randint(1, 60), rng.uniform(2, 9))
                for index in range(rng.randint(2, 5))
            ),
            start_s=rng.uniform(0, 20),
        )
        for number in range(10)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_plans_and_transfers_are_those_of_the_live_loop(seed):
    cluster = make_cluster(router=Scripted(*[0, 1] * 3), network=NETWORK)
    sessions = sorted(chats(seed), key=lambda session: session.start_s)
    live = LiveCluster(cluster.make_core, sessions)
    live.run()
    plans: list[tuple[StepPlan, float]] = []
    simulation = Simulator(cluster, sessions, on_plan=lambda plan, now: plans.append((plan, now)))
    transfers: dict[int, list[tuple[SlowTransfer, float]]] = {0: [], 1: []}
    for rank, replica in simulation._replicas.items():

        def start(transfer, now, rank=rank, begin=replica.peer.start):
            transfers[rank].append((transfer, now))
            begin(transfer, now)

        replica.peer.start = start
    simulation.run(1e9)
    assert sum(len(engine.transfers) for engine in live.engines) > 100
    for engine in live.engines:
        assert without_places(transfers[engine.rank]) == without_places(engine.transfers)
        engine.core.check_integrity()
    by_time = sorted(
        (plan for engine in live.engines for plan in engine.plans), key=lambda entry: (entry[1], repr(entry))
    )
    assert sorted(plans, key=lambda entry: (entry[1], repr(entry))) == by_time
