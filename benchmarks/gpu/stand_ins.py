"""In place of CUDA's streams and graphs, for smoke runs on a machine without a GPU: what is put in is done at once, and a
replay calls the recorded function again. They show that the code around them runs, and nothing about CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.executor.decode_graphs import bucket_sizes
from engine.executor.local import LocalExecutor
from engine.executor.model_runner import ModelRunner
from engine.executor.step_inputs import StepLimits
from engine.executor.streams import Streams


class Now:
    """A stream."""

    def run(self, launch: Callable[[], None]) -> None:
        launch()

    def record(self) -> Now:
        return self

    def wait(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


def streams() -> Streams:
    return Streams(Now(), Now(), Now())


class RerunGraph:
    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._run = run
        self.output = run()

    @torch.inference_mode()
    def replay(self) -> None:
        self.output = self._run()


class RerunMaker:
    def capture(self, run: Callable[[], torch.Tensor]) -> RerunGraph:
        return RerunGraph(run)


def give_graphs(executor: LocalExecutor, max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """A runner with everything in one place and recorded decode steps, as on a GPU."""
    limits = StepLimits(max_num_seqs, max_num_batched_tokens, executor.num_gpu_blocks)
    executor._runner = ModelRunner(
        executor.loaded, executor.gpu_store, executor._swapper, executor.attention_backend, limits
    )
    executor._runner.capture_graphs(RerunMaker(), bucket_sizes(max_num_seqs))
