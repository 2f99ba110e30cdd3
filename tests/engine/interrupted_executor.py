"""A real executor with something of a test's own in every step, whichever way the step comes."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from engine.core.executor_protocol import PendingStep
from engine.core.plan import StepPlan, StepResult
from engine.executor.local import LocalExecutor


class InterruptedExecutor(LocalExecutor):
    def interrupt(self, plan: StepPlan) -> None:
        """Called where the step begins; what it raises, the step raises."""

    def execute(self, plan: StepPlan) -> StepResult:
        self.interrupt(plan)
        return super().execute(plan)

    def submit(self, plan: StepPlan) -> PendingStep:
        interruption = self.steps_thread.submit(self.interrupt, plan)
        return _InterruptedStep(interruption, super().submit(plan))


@dataclass
class _InterruptedStep:
    interruption: Future[None]
    step: PendingStep

    def result(self, timeout: float | None = None) -> StepResult:
        result = self.step.result(timeout)
        self.interruption.result()
        return result
