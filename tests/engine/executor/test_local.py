"""One model in this process: where its steps run."""

import threading

import pytest
import torch

from engine.config import EngineConfig
from engine.core.plan import StepPlan, StepResult
from engine.executor.local import LocalExecutor


class WhereExecutor(LocalExecutor):
    """Notes the thread of each step, and torch's number of threads in it; fails where a plan asks for a request's end."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.seen: list[tuple[threading.Thread, int]] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.seen.append((threading.current_thread(), torch.get_num_threads()))
        if plan.ended:
            raise RuntimeError("injected fault")
        return super().execute(plan)


@pytest.fixture
def executor() -> WhereExecutor:
    return WhereExecutor(EngineConfig(num_gpu_blocks=4, num_cpu_blocks=0, num_threads=1))


def test_submitted_steps_run_in_one_thread_of_their_own(executor):
    plans = [StepPlan(number, ()) for number in range(1, 4)]
    assert [executor.submit(plan).result(60) for plan in plans] == [StepResult(number) for number in range(1, 4)]
    threads = {thread for thread, _ in executor.seen}
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert thread.name.startswith("executor")
    assert {num_threads for _, num_threads in executor.seen} == {1}
    executor.shutdown()
    assert not thread.is_alive()


def test_a_step_that_is_executed_runs_in_the_callers_thread(executor):
    executor.execute(StepPlan(1, ()))
    assert executor.seen == [(threading.current_thread(), 1)]
    executor.shutdown()


def test_a_submitted_step_that_fails_says_so_and_the_next_one_runs(executor):
    with pytest.raises(RuntimeError, match="injected fault"):
        executor.submit(StepPlan(1, (), ended=("a",))).result(60)
    assert executor.submit(StepPlan(2, ())).result(60) == StepResult(2)
    executor.shutdown()
