"""The protocol between the core's driver and whatever computes a step: a model in this process, a group of workers, or
a cost model in a simulation.
"""

from __future__ import annotations

from typing import Protocol

from engine.core.plan import StepPlan, StepResult


class ComputationFailedError(Exception):
    """The step's computation failed, but every copy of its plan was made: only its own requests are lost."""


class SamplingFailedError(ComputationFailedError):
    """The logits were there, on all ranks that compute them together; only choosing tokens failed."""


class PendingStep(Protocol):
    """A step that was submitted; a concurrent.futures.Future of its result is one."""

    def result(self, timeout: float | None = None) -> StepResult:
        """Wait for it; as `execute` otherwise. Call it once, in the order of the steps."""
        ...


class Executor(Protocol):
    """max_steps_in_flight: how many steps may be submitted that have not been waited for. Where it is more than one, a step
    begins without knowing what the one before it sampled."""

    max_steps_in_flight: int

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step. On any exception the driver fails the requests of the plan and goes on with the next; unless it
        is ComputationFailedError, it takes every copy of the plan for lost."""
        ...

    def submit(self, plan: StepPlan) -> PendingStep:
        """`execute` elsewhere; returns at once. Steps are computed in order."""
        ...

    def check_health(self) -> None:
        """Raises EngineStoppedError where no step can be computed any more."""
        ...

    def shutdown(self) -> None:
        """Give devices and workers back. No call follows."""
        ...
