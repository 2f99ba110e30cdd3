"""Stand-ins for CUDA's streams and graphs, for smoke runs on a machine without a GPU.

Queued work is done at once, and a replay calls the recorded function again. They show that the code around them runs,
and nothing about CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from engine.attention.protocol import AttentionBackend, AttentionMetadata
from engine.executor.local import LocalExecutor
from engine.executor.model_runner import ModelRunner
from engine.executor.step_graphs import bucket_sizes, prompt_sizes
from engine.executor.step_inputs import StepLimits
from engine.executor.tiers.streams import Streams


class Now:
    """A stream."""

    def run(self, launch: Callable[[], None]) -> None:
        launch()

    def mark(self) -> Now:
        return self

    def elapsed_time(self, end: Now, /) -> float:
        return 0.0

    def record(self, gate: Any = None) -> Now:
        return self

    def wait(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


def streams() -> Streams:
    return Streams(Now(), Now(), Now(), Now)


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


class SkippingPadding:
    """A backend that knows nothing of padding, made to write no row whose slot is -1."""

    CAN_REPLAY_DECODES = CAN_REPLAY_PROMPTS = True

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self.attend = backend.attend

    def write_kv(
        self,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        written = metadata.slot_mapping >= 0
        slots = replace(metadata, slot_mapping=metadata.slot_mapping[written])
        self._backend.write_kv(k_pool, v_pool, key[:, written], value[:, written], slots)


def give_graphs(executor: LocalExecutor, max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """A runner with everything in one place and recorded decode steps, as on a GPU."""
    limits = StepLimits(max_num_seqs, max_num_batched_tokens, executor.num_gpu_blocks)
    backend = executor.attention_backend
    if not backend.CAN_REPLAY_DECODES:
        backend = SkippingPadding(backend)
    executor.runner = ModelRunner(executor.loaded, executor.gpu_store, executor.runner.swapper, backend, limits)
    executor.runner.capture_graphs(RerunMaker(), bucket_sizes(max_num_seqs), prompt_sizes(max_num_batched_tokens))
