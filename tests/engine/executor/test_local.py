"""One model in this process: where its steps run."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from engine.config import EngineConfig
from engine.core.plan import StepPlan, StepResult
from engine.errors import DeviceFailedError, EngineStoppedError
from engine.executor import host, model_runner
from engine.executor.host import available_cores
from tests.engine.interrupted_executor import InterruptedExecutor


class WhereExecutor(InterruptedExecutor):
    """Notes the thread of each step, and torch's number of threads in it; fails where a plan asks for a request's end."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.seen: list[tuple[threading.Thread, int]] = []

    def interrupt(self, plan: StepPlan) -> None:
        self.seen.append((threading.current_thread(), torch.get_num_threads()))
        if plan.ended:
            raise RuntimeError("injected fault")


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


def test_pinned_pages_are_given_back_even_if_the_swapper_cannot_end(executor, monkeypatch):
    calls = []

    def fail() -> None:
        calls.append("swapper")
        raise RuntimeError("a copy failed")

    swapper = executor.runner.swapper
    with monkeypatch.context() as patch:
        patch.setattr(swapper, "shutdown", fail)
        patch.setattr(executor.cpu_store, "unpin", lambda: calls.append("unpin"))
        with pytest.raises(RuntimeError, match="a copy failed"):
            executor.shutdown()
    assert calls == ["swapper", "unpin"]
    swapper.shutdown()


def test_a_submitted_step_that_fails_says_so_and_the_next_one_runs(executor):
    with pytest.raises(RuntimeError, match="injected fault"):
        executor.submit(StepPlan(1, (), ended=("a",))).result(60)
    assert executor.submit(StepPlan(2, ())).result(60) == StepResult(2)
    executor.shutdown()


# -- the cores and the memory of the process ---------------------------------------------------------------------------


def test_the_cores_are_those_of_omp_num_threads_or_else_of_affinity_and_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(host, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert available_cores() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert available_cores() == 8
    for quota, cores in [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)]:
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert available_cores() == cores


def run_in_a_process_of_its_own(script: str) -> list[int]:
    """The numbers that a script prints; what it does is for the whole process."""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [int(word) for word in process.stdout.split()]


OPENMP = """
import os, torch
from engine.executor.host import end_openmp_team
num_tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
before = num_tasks()
torch.ones(1 << 20).add(1)
during = num_tasks()
end_openmp_team()
print(before, during, num_tasks(), int(torch.ones(1 << 20).add(1).sum()))
"""

MEMORY = """
import resource, torch
from engine.executor.host import keep_freed_memory
num_faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
keep_freed_memory()
for _ in range(10):
    torch.zeros(4 << 20)
before = num_faults()
for _ in range(20):
    torch.zeros(4 << 20)
print(num_faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP and C library")
def test_the_loading_thread_gives_its_openmp_threads_back():
    before, during, after, total = run_in_a_process_of_its_own(OPENMP)
    assert during == before + 2
    assert after == before
    assert total == 2 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP and C library")
def test_freed_activations_are_used_again():
    """16 MiB are 4096 pages, which 20 rounds would fetch 20 times.

    Small allocations of the first two or three rounds may split the block that they free; from then on it has its place.
    """
    (num_faults,) = run_in_a_process_of_its_own(MEMORY)
    assert num_faults < 4096


def test_a_step_that_breaks_the_device_is_the_last_one(executor, monkeypatch):
    """Unlike after any other fault: what comes after an illegal address fails, too, in whatever request."""

    def fail(*_: object) -> None:
        raise DeviceFailedError("cuda:0 failed; restart this process")

    executor.check_health()
    monkeypatch.setattr(model_runner, "check_device", fail)
    monkeypatch.setattr(executor.runner.swapper, "begin", lambda plan: 1 / 0)
    with pytest.raises(DeviceFailedError):
        executor.submit(StepPlan(1, ())).result(60)
    with pytest.raises(EngineStoppedError, match=r"cuda:0 failed; restart"):
        executor.check_health()
    executor.shutdown()
