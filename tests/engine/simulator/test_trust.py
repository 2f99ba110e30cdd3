"""The simulator does what the engine does: the same plans as the live loop, and times that follow from closed forms."""

import heapq
import random
from concurrent.futures import Future

import pytest

from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.plan import StepPlan, StepResult
from engine.simulator.clients import Client
from engine.simulator.devices import Device, ModelShape
from engine.simulator.routing import LeastLoaded
from engine.simulator.simulator import Cluster, Simulator
from engine.simulator.step_cost import Roofline, StepWork
from engine.step_loop import LookAhead, StepLoop
from engine.workloads.session import Session, Span, Turn
from engine.workloads.sources import WorkloadOptions, load_workload
from tests.nightly import nightly

CHUNK_SIZE = 16
MODEL = ModelShape(num_parameters=1e9, num_layers=10, num_heads=16, num_kv_heads=16, head_dim=64)
DEVICE = Device(
    flops_per_s=1e14,
    hbm_bytes_per_s=1e12,
    memory_bytes=1e10,
    host_to_device=2e9,
    device_to_host=1e10,
    matmul_efficiency=0.5,
    attention_flops_per_s=1e13,
    hbm_efficiency=0.5,
    kv_efficiency=0.5,
    step_overhead_s=0.001,
)
COST = Roofline(MODEL, DEVICE, MODEL.kv_bytes_per_token * CHUNK_SIZE)


def make_cluster(num_gpu_blocks: int = 64, num_cpu_blocks: int = 128, **options) -> Cluster:
    def make_core() -> EngineCore:
        return EngineCore(
            CacheConfig(
                chunk_size=CHUNK_SIZE,
                num_gpu_blocks=num_gpu_blocks,
                num_cpu_blocks=num_cpu_blocks,
                keep=options.get("keep", True),
                cost_model=COST.cost_model(CHUNK_SIZE),
                max_swap_outs=options.get("max_swap_outs", 16),
            ),
            SchedulingConfig(
                max_model_len=num_gpu_blocks * CHUNK_SIZE,
                max_num_seqs=options.get("max_num_seqs", 8),
                max_num_batched_tokens=options.get("max_num_batched_tokens", 512),
                max_num_queued_reqs=1_000_000,
            ),
        )

    return Cluster(make_core=make_core, cost=COST, router=LeastLoaded())


def chats(seed: int, num_sessions: int = 30) -> list[Session]:
    """Some that share a beginning; they overload the GPU tier."""
    rng = random.Random(seed)
    sessions = []
    for number in range(num_sessions):
        prefix = (Span(rng.randrange(3), rng.randint(1, 40)),)
        turns = [
            Turn(
                (*(prefix if index == 0 else ()), Span(100 + number, rng.randint(1, 60), 60 * index)),
                rng.randint(1, 40),
                0.0 if index == 0 else rng.choice([0.0, 0.05, 0.5, 2.0]),
            )
            for index in range(rng.randint(1, 5))
        ]
        sessions.append(Session(f"s{number}", tuple(turns), start_s=number * rng.choice([0.01, 0.1])))
    return sorted(sessions, key=lambda session: session.start_s)


# -- the live loop -----------------------------------------------------------------------------------------------------


class LiveLoop:
    """The engine's own loop with an executor that only lets time pass, and clients that do what Simulator's do."""

    max_steps_in_flight = 1

    def __init__(self, core: EngineCore, sessions: list[Session]) -> None:
        self.now = 0.0
        self.plans: list[tuple[StepPlan, float]] = []
        self._core = core
        self._loop = StepLoop(core, self, self, lambda: self.now, LookAhead.NOTHING)
        self._clients = {session.session_id: Client(session, number) for number, session in enumerate(sessions)}
        self._arrivals = [(session.start_s, number, session.session_id) for number, session in enumerate(sessions)]
        self._num_arrivals = len(sessions)

    def run(self) -> None:
        while self._arrivals or self._core.has_requests:
            while self._arrivals and self._arrivals[0][0] <= self.now:
                time_s, _, name = heapq.heappop(self._arrivals)
                self._clients[name].ask(time_s)
                self._core.add_request(self._clients[name].request(CHUNK_SIZE), time_s)
            if self._loop.step() is None and self._arrivals:
                self.now = self._arrivals[0][0]

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append((plan, self.now))
        self.now += COST.step_time(StepWork.of(plan))
        tokens = [self._client(segment.request_id).token for segment in plan.segments if segment.samples]
        return StepResult(plan.step_id, tuple(tokens))

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        raise AssertionError("nothing is launched ahead")

    def check_health(self) -> None:
        pass

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

    @property
    def requests(self):
        return self._requests


class RememberingCore(EngineCore):
    """Knows its requests after their end, too."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.seen = {}

    def add_request(self, request, now):
        self.seen[request.request_id] = request
        return super().add_request(request, now)


@pytest.mark.parametrize("seed", range(4))
def test_the_plans_are_those_of_the_live_loop(seed):
    """Step by step, with their times."""
    cluster, sessions = make_cluster(), chats(seed)
    plain = cluster.make_core()
    core = RememberingCore(plain.cache_config, plain.scheduling_config)
    live = LiveLoop(core, sessions)
    live._requests = core.seen
    live.run()
    plans: list[tuple[StepPlan, float]] = []
    Simulator(cluster, sessions, on_plan=lambda plan, now: plans.append((plan, now))).run(1e9)
    assert len(plans) > 300
    assert sum(len(plan.swap_ins) for plan, _ in plans) > 10
    assert plans == live.plans


@pytest.mark.parametrize("seed", range(4))
def test_steps_that_are_applied_at_once_change_nothing(seed):
    """Each turn's times and counts, and each replica's counters and time."""
    sessions = chats(seed)
    runs = [Simulator(make_cluster(), sessions, on_plan=on_plan).run(1e9) for on_plan in (None, lambda plan, now: None)]
    assert list(runs[0].turns) == list(runs[1].turns)
    for left, right in zip(runs[0].replicas, runs[1].replicas, strict=True):
        assert left.counters == right.counters
        assert (left.busy_s, left.recompute_s) == (pytest.approx(right.busy_s), right.recompute_s)


# -- closed forms ------------------------------------------------------------------------------------------------------


def one_turn(session: str, stream: int, start_s: float, num_new: int, num_output: int) -> Session:
    return Session(session, (Turn((Span(stream, num_new),), num_output),), start_s)


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
