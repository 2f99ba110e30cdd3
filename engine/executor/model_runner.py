"""Computes one step: plan to tensors, forward, logits of the last rows, sampling. Keeps what a worker must know of each
started request (block table, sampling state) and nothing else between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.interface import PagedAttention, attention_handled_by
from engine.attention.metadata import AttentionMetadata, AttentionSegment
from engine.core.executor import ComputationFailedError
from engine.core.plan import QuerySegment, SampledToken, StepPlan, StepResult
from engine.executor.kv_store import KVStore
from engine.executor.model_loader import LoadedModel
from engine.executor.sampler import SamplingState, sample
from engine.executor.swapper import Swapper


@dataclass(slots=True)
class _RequestState:
    """block_table: int64 [capacity], the first `num_blocks` of it in use; grows by doubling."""

    block_table: np.ndarray
    num_blocks: int
    sampling: SamplingState

    def append_block(self, block_id: int) -> None:
        if self.num_blocks == len(self.block_table):
            self.block_table = np.concatenate([self.block_table, np.empty_like(self.block_table)])
        self.block_table[self.num_blocks] = block_id
        self.num_blocks += 1


class ModelRunner:
    """One model (or one rank's shard of it) and its KV."""

    def __init__(self, loaded: LoadedModel, kv_store: KVStore, swapper: Swapper) -> None:
        self._loaded = loaded
        self._kv_store = kv_store
        self._swapper = swapper
        self._requests: dict[str, _RequestState] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        self._follow(plan)
        wait_for_layer = self._swapper.begin(plan)
        samples: list[SampledToken] = []
        failure: Exception | None = None
        try:
            if plan.segments:
                states = [self._requests[segment.request_id].sampling for segment in plan.segments if segment.samples]
                samples = sample(self._forward(plan.segments, wait_for_layer), states)
        except Exception as error:
            failure = error
        # Whatever happened, no copy may be under way when the core decides about the blocks again.
        failed_swap_ins = self._swapper.finish()
        if failure is not None and not failed_swap_ins:
            raise ComputationFailedError(repr(failure)) from failure
        if failure is not None:
            raise failure
        return StepResult(plan.step_id, tuple(samples), failed_swap_ins)

    def _follow(self, plan: StepPlan) -> None:
        for request_id in plan.ended:
            self._requests.pop(request_id, None)
        for start in plan.starts:
            self._requests[start.request_id] = _RequestState(
                np.array(start.block_table, dtype=np.int64),
                len(start.block_table),
                SamplingState(
                    start.request_id,
                    start.sampling,
                    start.token_ids,
                    start.num_prompt_tokens,
                    start.stop_token_ids,
                ),
            )
        for append in plan.appends:
            self._requests[append.request_id].append_block(append.block_id)

    @torch.inference_mode()
    def _forward(
        self, segments: tuple[QuerySegment, ...], wait_for_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        """Logits [number of sampling segments, vocabulary]. Writes the KV of all rows."""
        device = self._loaded.device
        input_ids = np.concatenate([np.asarray(segment.token_ids, dtype=np.int64) for segment in segments])
        positions = np.concatenate([np.arange(s.start, s.context_len, dtype=np.int64) for s in segments])
        metadata, last_rows = self._metadata(segments, positions)
        attention = PagedAttention(metadata, self._kv_store.layer_pools, wait_for_layer)
        with attention_handled_by(attention):
            logits = self._loaded.model(
                input_ids=torch.from_numpy(input_ids).to(device)[None],
                position_ids=torch.from_numpy(positions).to(device)[None],
                use_cache=False,
                logits_to_keep=torch.tensor(last_rows, dtype=torch.long, device=device),
            ).logits[0]
        assert attention.num_calls == len(self._kv_store.layer_pools), "a layer did not attend"
        return logits

    def _metadata(
        self, segments: tuple[QuerySegment, ...], positions: np.ndarray
    ) -> tuple[AttentionMetadata, list[int]]:
        """Attention metadata, and the rows whose logits are wanted."""
        device, chunk_size = self._loaded.device, self._kv_store.chunk_size
        chunk_numbers, offsets = np.divmod(positions, chunk_size)
        slots = np.empty_like(positions)
        attention_segments, last_rows = [], []
        row = 0
        for segment in segments:
            table = self._requests[segment.request_id].block_table
            rows = slice(row, row + segment.query_len)
            slots[rows] = table[chunk_numbers[rows]] * chunk_size + offsets[rows]
            num_blocks = -(-segment.context_len // chunk_size)
            block_ids = torch.from_numpy(table[:num_blocks]).to(device)
            attention_segments.append(AttentionSegment(row, segment.query_len, segment.context_len, block_ids))
            row += segment.query_len
            if segment.samples:
                last_rows.append(row - 1)
        slot_mapping = torch.from_numpy(slots).to(device)
        return AttentionMetadata(slot_mapping, tuple(attention_segments), chunk_size), last_rows
