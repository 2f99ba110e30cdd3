"""Computes one step: plan to tensors, forward, logits of the last rows, sampling. Keeps what a worker must know of each
started request (block table, sampling state) and nothing else between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from engine.attention.interface import PagedAttention, attention_handled_by
from engine.attention.metadata import AttentionBackend, AttentionMetadata
from engine.core.executor import ComputationFailedError, SamplingFailedError
from engine.core.plan import Logprobs, QuerySegment, RequestStart, StepPlan, StepResult
from engine.executor.kv_store import KVStore
from engine.executor.model_loader import LoadedModel
from engine.executor.sampler import SamplingState, sample
from engine.executor.swapper import Swapper


class BlockTables:
    """The block tables of all started requests: `array` is int32 [rows, capacity], a row a request. Both dimensions grow by
    doubling; what lies behind a row's `num_blocks` means nothing."""

    def __init__(self) -> None:
        self.array = np.zeros((8, 8), dtype=np.int32)
        self._num_blocks = np.zeros(8, dtype=np.int64)
        self._free_rows = list(range(7, -1, -1))

    def add(self, block_ids: Sequence[int]) -> int:
        """The row of a new table."""
        if not self._free_rows:
            num_rows = len(self.array)
            self.array = np.concatenate([self.array, np.zeros_like(self.array)])
            self._num_blocks = np.concatenate([self._num_blocks, np.zeros_like(self._num_blocks)])
            self._free_rows = list(range(2 * num_rows - 1, num_rows - 1, -1))
        row = self._free_rows.pop()
        self._reserve(len(block_ids))
        self.array[row, : len(block_ids)] = block_ids
        self._num_blocks[row] = len(block_ids)
        return row

    def append(self, row: int, block_id: int) -> None:
        num_blocks = int(self._num_blocks[row])
        self._reserve(num_blocks + 1)
        self.array[row, num_blocks] = block_id
        self._num_blocks[row] = num_blocks + 1

    def remove(self, row: int) -> None:
        self._free_rows.append(row)

    def _reserve(self, num_blocks: int) -> None:
        while self.array.shape[1] < num_blocks:
            self.array = np.concatenate([self.array, np.zeros_like(self.array)], axis=1)


@dataclass(slots=True)
class _RequestState:
    """table_row: of the request's block table. sampling: None on a rank that does not sample. last_token: what was sampled
    last, alone; None before that."""

    table_row: int
    sampling: SamplingState | None
    last_token: tuple[int] | None = None


class ModelRunner:
    """One model (or one rank's shard of it) and its KV."""

    def __init__(
        self,
        loaded: LoadedModel,
        kv_store: KVStore,
        swapper: Swapper,
        backend: AttentionBackend,
        *,
        samples: bool = True,
    ) -> None:
        """samples: False on the ranks that are told what rank 0 sampled."""
        self._loaded = loaded
        self._samples = samples
        # Those that the last step sampled for, in order.
        self._sampled: list[_RequestState] = []
        self._backend = backend
        self._tables = BlockTables()
        self._kv_store = kv_store
        self._swapper = swapper
        self._requests: dict[str, _RequestState] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        self._follow(plan)
        wait_for_layer = self._swapper.begin(plan)
        token_ids: tuple[int, ...] = ()
        logprobs: tuple[Logprobs | None, ...] = ()
        failure: Exception | None = None
        has_logits = False
        self._sampled = [self._requests[segment.request_id] for segment in plan.segments if segment.samples]
        try:
            if plan.segments:
                logits = self._forward(plan.segments, wait_for_layer)
                has_logits = True
                if self._samples:
                    token_ids, logprobs = sample(logits, [s.sampling for s in self._sampled if s.sampling is not None])
                    self.note_sampled(token_ids)
        except Exception as error:
            failure = error
        # Whatever happened, no copy may be under way when the core decides about the blocks again.
        failed_swap_ins = self._swapper.finish()
        if failure is not None and not failed_swap_ins:
            raise (SamplingFailedError if has_logits else ComputationFailedError)(repr(failure)) from failure
        if failure is not None:
            raise failure
        return StepResult(plan.step_id, token_ids, logprobs, failed_swap_ins)

    def note_sampled(self, token_ids: Sequence[int]) -> None:
        """What was sampled in the last step, in the order of its segments; nothing where that failed."""
        for state, token_id in zip(self._sampled, token_ids, strict=bool(token_ids)):
            state.last_token = (token_id,)

    def _follow(self, plan: StepPlan) -> None:
        for request_id in plan.ended:
            state = self._requests.pop(request_id, None)
            if state is not None:
                self._tables.remove(state.table_row)
        for start in plan.starts:
            self._requests[start.request_id] = _RequestState(
                self._tables.add(start.block_table),
                _sampling_state(start) if self._samples else None,
            )
        for append in plan.appends:
            self._tables.append(self._requests[append.request_id].table_row, append.block_id)

    @torch.inference_mode()
    def _forward(
        self, segments: tuple[QuerySegment, ...], wait_for_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        """Logits [number of sampling segments, vocabulary]. Writes the KV of all rows."""
        device, chunk_size = self._loaded.device, self._kv_store.chunk_size
        states = [self._requests[segment.request_id] for segment in segments]
        # Every array of the step in a few operations over all segments, whatever their number.
        token_ids = np.fromiter(chain.from_iterable(map(_token_ids, segments, states)), dtype=np.int64)
        starts = np.array([segment.start for segment in segments])
        lengths = np.array([segment.query_len for segment in segments])
        table_rows = np.array([state.table_row for state in states])
        ends = lengths.cumsum()
        first_rows = ends - lengths
        positions = np.arange(len(token_ids)) + np.repeat(starts - first_rows, lengths)
        chunk_numbers, offsets = np.divmod(positions, chunk_size)
        block_ids = self._tables.array[np.repeat(table_rows, lengths), chunk_numbers]
        descriptors = np.stack([first_rows, lengths, starts + lengths, table_rows], axis=1).astype(np.int32)
        metadata = AttentionMetadata(
            slot_mapping=torch.from_numpy(block_ids * np.int64(chunk_size) + offsets).to(device),
            segments=torch.from_numpy(descriptors).to(device),
            block_tables=torch.from_numpy(self._tables.array).to(device),
            chunk_size=chunk_size,
            host_segments=descriptors,
        )
        last_rows = ends[[segment.samples for segment in segments]] - 1
        attention = PagedAttention(self._backend, metadata, self._kv_store.layer_pools, wait_for_layer)
        with attention_handled_by(attention):
            logits: torch.Tensor = self._loaded.model(
                input_ids=torch.from_numpy(token_ids).to(device)[None],
                position_ids=torch.from_numpy(positions).to(device)[None],
                use_cache=False,
                logits_to_keep=torch.from_numpy(last_rows).to(device),
            ).logits[0]
        assert attention.num_calls == len(self._kv_store.layer_pools), "a layer did not attend"
        return logits


def _sampling_state(start: RequestStart) -> SamplingState:
    return SamplingState(
        start.sampling, start.num_tokens, start.num_prompt_tokens, start.stop_token_ids, start.token_ids
    )


def _token_ids(segment: QuerySegment, state: _RequestState) -> tuple[int, ...]:
    if segment.token_ids is not None:
        return segment.token_ids
    assert state.last_token is not None, "a decode before anything was sampled"
    return state.last_token
