"""The engine's loop: one core and one executor, a step at a time.

Knows no thread, no asyncio and no clock.

    step()   schedule    core.schedule                     what to compute
             launch      executor.submit                   the device begins
             look ahead  core.schedule_ahead + submit      the step behind it, if that needs no result; else a draft of it
             deliver     outputs.deliver                   the text of the step before, while the device computes
             update      core.update(await the result)     tokens come in, requests end
    beside it, transport.start and .poll: blocks come from and go to slow tiers

The engine's thread, the tests' drivers and the benchmarks all call `StepLoop.step`; there is no second loop.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from typing import NamedTuple, Protocol

from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.executor_protocol import ComputationFailedError, Executor
from engine.core.plan import SlowTransfer, StepPlan, StepResult, TransferEnd
from engine.errors import EngineError, EngineStoppedError, ExecutorError, GrammarFailedError

logger = logging.getLogger(__name__)

# Steps in a row that may fail before the engine reports itself as broken: one may be the fault of its request.
MAX_FAILURES_IN_A_ROW = 3


class LookAhead(Enum):
    """What happens to the next step while one is computed."""

    NOTHING = "nothing"  # the step is computed by the thread that calls `step`
    DRAFT = "draft"  # it is drafted, so that it is scheduled faster
    LAUNCH = "launch"  # it is launched behind the first one, unless it depends on that one's result


def choose_look_ahead(is_overlapped: bool | None, executor: Executor) -> LookAhead:
    """The most that the executor can do.

    is_overlapped: whether steps overlap at all; None = unless the executor computes on a CPU, which computes alone.
    """
    if is_overlapped is None:
        is_overlapped = not executor.facts.is_on_cpu
    if not is_overlapped:
        return LookAhead.NOTHING
    return LookAhead.LAUNCH if executor.max_steps_in_flight > 1 else LookAhead.DRAFT


class Outputs(Protocol):
    """Takes what the steps give, and passes it on."""

    def add(self, outputs: Iterable[RequestOutput]) -> None:
        """Take in what a step gave."""
        ...

    def deliver(self) -> None:
        """Pass on everything that was taken in."""
        ...

    def fail(self, request_ids: Iterable[str], error: EngineError) -> None:
        """End the answers of these requests with an error, behind what they got before."""
        ...


class Transport(Protocol):
    """Carries out the transfers of slow tiers, beside the steps. Both calls return at once.

    If the thread that steps waits for commands, the end of a transfer has to wake it (EngineThread.put). Its owner has to
    end it before the executor is shut down, which frees the blocks.
    """

    def start(self, transfer: SlowTransfer) -> None:
        """Begin to copy."""
        ...

    def poll(self) -> Iterable[TransferEnd]:
        """Of the transfers that have ended since the last call, each once."""
        ...


class PeerAnswers(Protocol):
    """Told what the core does not do, or has done, for peers. Both calls return at once."""

    def decline(self, keys: Iterable[bytes]) -> None:
        """These chunks, which peers have asked for, are not sent."""
        ...

    def end_offers(self, offer_ids: Iterable[str]) -> None:
        """All that was wanted of these offers has come, or does not."""
        ...


class _Launched(NamedTuple):
    plan: StepPlan
    wait: Callable[[], StepResult]


class StepLoop:
    """Drives one core with one executor. Calls of `step` may come from any thread, but only one at a time."""

    def __init__(
        self,
        core: EngineCore,
        executor: Executor,
        outputs: Outputs,
        now: Callable[[], float],
        look_ahead: LookAhead,
        transport: Transport | None = None,
        peers: PeerAnswers | None = None,
    ) -> None:
        """Computes nothing yet.

        now: the time in seconds, for the core.
        look_ahead: may be changed between two steps, if none is in flight.
        transport: for slow tiers; None = there are none.
        peers: if one of them is that of other engines.
        """
        self.look_ahead = look_ahead
        self._core = core
        self._executor = executor
        self._outputs = outputs
        self._transport = transport
        self._peers = peers
        self._now = now
        self._in_flight: deque[_Launched] = deque()
        self._num_failures = 0  # in a row

    def step(self) -> StepPlan | None:
        """Finish one step and return its plan; None if there is nothing to compute or copy."""
        self._end_transfers()
        if not self._in_flight:
            self._launch(self._core.schedule(self._now()))
        if not self._in_flight:
            self._outputs.deliver()
            return None
        is_overlapped = self.look_ahead is not LookAhead.NOTHING
        if is_overlapped:
            self._look_ahead(self._in_flight[0].plan)
            self._outputs.deliver()
        launched = self._in_flight.popleft()
        self._finish(launched)
        if not is_overlapped:
            self._outputs.deliver()
        return launched.plan

    def max_pause_s(self) -> float | None:
        """How long to wait at most before `step` is called again, after it had nothing to do, if nothing else happens.

        In seconds; None = for ever.
        """
        deadline_s = self._core.next_deadline_s()
        return None if deadline_s is None else max(0.0, deadline_s - self._now())

    @property
    def in_flight(self) -> tuple[StepPlan, ...]:
        """The plans that were launched and have no result yet, the oldest first."""
        return tuple(launched.plan for launched in self._in_flight)

    def check_health(self) -> None:
        """Raise EngineStoppedError if no further step can be computed."""
        self._executor.check_health()
        if self._num_failures >= MAX_FAILURES_IN_A_ROW:
            raise EngineStoppedError(f"the last {self._num_failures} steps failed; see the log")

    def _end_transfers(self) -> None:
        if self._transport is not None:
            for end in self._transport.poll():
                self._core.complete_transfer(end, self._now())

    def _start_transfers(self) -> None:
        if self._transport is not None:
            for transfer in self._core.take_transfers():
                self._transport.start(transfer)
        if self._peers is not None and self._core.handover is not None:
            if declined := self._core.handover.take_declined():
                self._peers.decline(declined)
            if ended := self._core.handover.take_ended_offers():
                self._peers.end_offers(ended)

    def _launch(self, plan: StepPlan | None) -> None:
        self._start_transfers()
        if plan is None:
            return
        if self.look_ahead is LookAhead.NOTHING:
            self._in_flight.append(_Launched(plan, partial(self._executor.execute, plan)))
        else:
            self._in_flight.append(_Launched(plan, self._executor.submit(plan).result))

    def _look_ahead(self, executing: StepPlan) -> None:
        if self.look_ahead is LookAhead.LAUNCH:
            self._launch(self._core.schedule_ahead(self._now()))
        else:
            self._core.draft_ahead(executing)

    def _finish(self, launched: _Launched) -> None:
        """Wait for the result of a step and tell it to the core; or that it failed."""
        try:
            result = launched.wait()
        except Exception as error:
            self._fail(launched.plan, error)
            return
        num_computed = self._core.stats.num_computed_tokens
        for request_id, _ in result.failed_requests:
            self._core.abort(request_id, self._now())
        self._outputs.add(self._core.update(launched.plan, result, self._now()))
        for request_id, reason in result.failed_requests:
            message = f"the answer cannot go on within its grammar: {reason}; simplify the grammar"
            self._outputs.fail([request_id], GrammarFailedError(message, param="grammar"))
        if (
            self._core.stats.num_computed_tokens > num_computed
        ):  # else its requests had ended, behind a step that failed
            self._num_failures = 0

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        self._executor.check_health()  # a broken executor ends the loop: this raises
        logger.exception("step %d failed", plan.step_id)
        are_copies_made = isinstance(error, ComputationFailedError)
        failed = self._core.fail_step(plan, self._now(), are_copies_made=are_copies_made)
        # A step behind a failed one may fail for the same requests, which have ended by then.
        self._num_failures += bool(failed) or not plan.segments
        self._outputs.fail(failed, ExecutorError(f"the step that computed this request failed: {error!r}"))
