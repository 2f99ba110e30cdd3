"""The protocol between the core's driver and whatever computes a step: a model in this process, a group of workers, or
a cost model in a simulation.
"""

from __future__ import annotations

from typing import Protocol

from engine.core.plan import StepPlan, StepResult


class Executor(Protocol):
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step. On any exception the driver fails the requests of the plan and goes on with the next."""
        ...

    def shutdown(self) -> None:
        """Give devices and workers back. No call follows."""
        ...
