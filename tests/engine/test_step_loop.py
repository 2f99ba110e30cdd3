"""The order of things in a step, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future

import pytest

from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.executor_protocol import ComputationFailedError
from engine.core.plan import StepPlan, StepResult
from engine.core.request import Request, SamplingParams
from engine.errors import EngineError, EngineStoppedError, ExecutorError
from engine.step_loop import MAX_FAILURES_IN_A_ROW, LookAhead, StepLoop


class Scribe:
    """Executor and outputs in one, which notes what it is asked for. error: what the next steps raise."""

    max_steps_in_flight = 2

    def __init__(self) -> None:
        self.events: list[str] = []
        self.error: Exception | None = None
        self.is_broken = False
        self.failed: list[tuple[list[str], EngineError]] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.events.append(f"execute {plan.step_id}")
        if self.error is not None:
            raise self.error
        return StepResult(plan.step_id, tuple(7 for segment in plan.segments if segment.samples))

    def submit(self, plan: StepPlan) -> _Step:
        self.events.append(f"submit {plan.step_id}")
        return _Step(self, plan)

    def check_health(self) -> None:
        if self.is_broken:
            raise EngineStoppedError("the device is broken")

    def add(self, outputs: Iterable[RequestOutput]) -> None:
        self.events.append(f"add {len(list(outputs))}")

    def deliver(self) -> None:
        self.events.append("deliver")

    def fail(self, request_ids: Iterable[str], error: EngineError) -> None:
        self.failed.append((list(request_ids), error))


class _Step:
    def __init__(self, scribe: Scribe, plan: StepPlan) -> None:
        self._scribe, self._plan = scribe, plan

    def result(self, timeout: float | None = None) -> StepResult:
        return self._scribe.execute(self._plan)


@pytest.fixture
def scribe() -> Scribe:
    return Scribe()


@pytest.fixture
def core(scribe: Scribe, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    core = EngineCore(CacheConfig(num_gpu_blocks=16, chunk_size=4), SchedulingConfig(max_model_len=64))

    def noted(name: str, method: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: scribe.events.append(name) or method(*args)

    for name in ("schedule", "schedule_ahead", "draft_ahead"):
        monkeypatch.setattr(core, name, noted(name, getattr(core, name)))
    return core


def make_loop(core: EngineCore, scribe: Scribe, look_ahead: LookAhead) -> StepLoop:
    return StepLoop(core, scribe, scribe, lambda: 0.0, look_ahead)  # type: ignore[arg-type]


def ask(core: EngineCore, name: str, max_tokens: int = 3) -> None:
    core.add_request(Request(name, (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=max_tokens)), 0.0)


@pytest.mark.parametrize(
    ("look_ahead", "first", "second"),
    [
        (
            LookAhead.NOTHING,
            ["schedule", "execute 1", "add 1", "deliver"],
            ["schedule", "execute 2", "add 1", "deliver"],
        ),
        (
            LookAhead.DRAFT,
            ["schedule", "submit 1", "draft_ahead", "deliver", "execute 1", "add 1"],
            ["schedule", "submit 2", "draft_ahead", "deliver", "execute 2", "add 1"],
        ),
        (
            LookAhead.LAUNCH,
            ["schedule", "submit 1", "schedule_ahead", "submit 2", "deliver", "execute 1", "add 1"],
            ["schedule_ahead", "submit 3", "deliver", "execute 2", "add 1"],
        ),
    ],
)
def test_the_order_of_a_step(core, scribe, look_ahead, first, second):
    loop = make_loop(core, scribe, look_ahead)
    ask(core, "a")
    for expected in (first, second):
        scribe.events.clear()
        plan = loop.step()
        assert plan is not None
        assert scribe.events == expected
        assert [launched.step_id for launched in loop.in_flight] == (
            [plan.step_id + 1] if look_ahead is LookAhead.LAUNCH else []
        )


@pytest.mark.parametrize("look_ahead", list(LookAhead))
def test_with_nothing_to_do_what_is_left_is_delivered(core, scribe, look_ahead):
    loop = make_loop(core, scribe, look_ahead)
    ask(core, "a")
    while loop.step() is not None:
        pass
    assert not core.has_requests
    assert loop.in_flight == ()
    scribe.events.clear()
    assert loop.step() is None
    assert scribe.events == ["schedule", "deliver"]


@pytest.mark.parametrize("look_ahead", list(LookAhead))
def test_a_step_that_fails_ends_its_requests_and_no_others(core, scribe, look_ahead):
    loop = make_loop(core, scribe, look_ahead)
    ask(core, "a")
    scribe.error = RuntimeError("injected fault")
    while core.has_requests:
        loop.step()
    ((failed, error),) = [each for each in scribe.failed if each[0]]
    assert failed == ["a"]
    assert isinstance(error, ExecutorError)
    assert "injected fault" in str(error)
    scribe.error = None
    ask(core, "b")
    while core.has_requests:
        loop.step()
    assert core.stats.num_finished == 1
    loop.check_health()
    core.check_integrity()


def test_copies_of_a_failed_computation_count_as_made(core, scribe, monkeypatch):
    told = []
    fail_step = core.fail_step
    monkeypatch.setattr(core, "fail_step", lambda plan, now, **made: told.append(made) or fail_step(plan, now, **made))
    loop = make_loop(core, scribe, LookAhead.NOTHING)
    for error in (ComputationFailedError("of the computation"), RuntimeError("of anything")):
        ask(core, "a")
        scribe.error = error
        loop.step()
    assert told == [{"are_copies_made": True}, {"are_copies_made": False}]


def test_failures_in_a_row_are_counted_until_a_step_succeeds(core, scribe):
    loop = make_loop(core, scribe, LookAhead.NOTHING)
    for num_failures in (MAX_FAILURES_IN_A_ROW - 1, MAX_FAILURES_IN_A_ROW):
        for _ in range(num_failures):
            loop.check_health()
            ask(core, "a")
            scribe.error = RuntimeError("injected fault")
            loop.step()
        if num_failures < MAX_FAILURES_IN_A_ROW:
            scribe.error = None
            ask(core, "b", max_tokens=1)
            loop.step()
    with pytest.raises(EngineStoppedError, match="last 3 steps failed"):
        loop.check_health()


def test_a_broken_executor_ends_the_loop(core, scribe):
    loop = make_loop(core, scribe, LookAhead.DRAFT)
    ask(core, "a")
    scribe.error, scribe.is_broken = RuntimeError("an illegal address"), True
    with pytest.raises(EngineStoppedError, match="device is broken"):
        loop.step()
    with pytest.raises(EngineStoppedError, match="device is broken"):
        loop.check_health()


def test_a_future_is_a_pending_step(core, scribe, monkeypatch):
    """As GroupExecutor gives it."""
    future: Future[StepResult] = Future()
    future.set_result(StepResult(1, (7,)))
    monkeypatch.setattr(scribe, "submit", lambda plan: future)
    loop = make_loop(core, scribe, LookAhead.DRAFT)
    ask(core, "a")
    assert loop.step() is not None
    assert scribe.events[-1] == "add 1"
