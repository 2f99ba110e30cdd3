"""Computes one step: plan to tensors, forward, logits of the last rows, sampling. Keeps what a worker must know of each
started request (block table, last token, sampling state) and nothing else between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from engine.attention.interface import PagedAttention, attention_handled_by
from engine.attention.metadata import AttentionBackend, AttentionMetadata
from engine.core.executor import ComputationFailedError, SamplingFailedError
from engine.core.plan import Logprobs, QuerySegment, RequestStart, StepPlan, StepResult
from engine.executor.decode_graphs import DecodeGraphs, GraphMaker
from engine.executor.kv_store import KVStore
from engine.executor.model_loader import LoadedModel
from engine.executor.sampler import SamplingBatch, SamplingState
from engine.executor.step_inputs import BlockTables, Staging, StepArrays, StepLimits
from engine.executor.swapper import Swapper


@dataclass(slots=True)
class _RequestState:
    """table_row: of the request's block table, and of its last token. sampling: None on a rank that does not sample."""

    table_row: int
    sampling: SamplingState | None


class ModelRunner:
    """One model (or one rank's shard of it) and its KV."""

    def __init__(
        self,
        loaded: LoadedModel,
        kv_store: KVStore,
        swapper: Swapper,
        backend: AttentionBackend,
        limits: StepLimits | None = None,
        *,
        samples: bool = True,
    ) -> None:
        """limits: with them, all that a step reads has its place on the device from the start, and reaches it in one copy;
        without, as on a CPU, tensors are made as they are needed. samples: False on the ranks that are told what rank 0
        sampled."""
        self._loaded = loaded
        self._samples = samples
        # Table rows of those that the last step sampled for, in order.
        self._sampled_rows: list[int] = []
        self._backend = backend
        self._kv_store = kv_store
        self._swapper = swapper
        self._requests: dict[str, _RequestState] = {}
        if limits is None:
            self._tables = BlockTables()
        else:
            self._tables = BlockTables(limits.max_num_seqs, limits.num_blocks, loaded.device)
        # The token that each request sampled last, by table row. It stays on the device: the next step need not wait for it.
        self._last_tokens = torch.zeros(len(self._tables.array), dtype=torch.long, device=loaded.device)
        self._staging = Staging(loaded.device, limits)
        self._graphs = DecodeGraphs()

    def capture_graphs(self, maker: GraphMaker, sizes: Sequence[int]) -> None:
        """Record decode steps of these sizes; needs limits, which no size may exceed. Raises ConfigError where memory runs
        out."""
        with torch.inference_mode():
            self._graphs.capture(maker, sizes, self._decode_step)

    def execute(self, plan: StepPlan) -> StepResult:
        self._follow(plan)
        wait_for_layer = self._swapper.begin(plan)
        token_ids: tuple[int, ...] = ()
        logprobs: tuple[Logprobs | None, ...] = ()
        failure: Exception | None = None
        has_logits = False
        self._sampled_rows = [
            self._requests[segment.request_id].table_row for segment in plan.segments if segment.samples
        ]
        try:
            if plan.segments:
                computed = self._compute(plan.segments, wait_for_layer)
                has_logits = True
                if self._samples:
                    token_ids, logprobs = self._sample(*computed)
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
        """What rank 0 sampled in the last step, in the order of its segments; nothing where that failed."""
        if token_ids:
            assert len(token_ids) == len(self._sampled_rows)
            tensor = torch.tensor([self._sampled_rows, token_ids], device=self._last_tokens.device)
            self._last_tokens.index_copy_(0, *tensor)

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
        missing = len(self._tables.array) - len(self._last_tokens)
        if missing > 0:
            self._last_tokens = torch.cat([self._last_tokens, self._last_tokens.new_zeros(missing)])

    @torch.inference_mode()
    def _compute(
        self, segments: tuple[QuerySegment, ...], wait_for_layer: Callable[[int], None] | None
    ) -> tuple[torch.Tensor, SamplingBatch, dict[str, torch.Tensor]]:
        """(logits [number of sampling segments, vocabulary], how to sample from them, what was sent to the device)."""
        states = [self._requests[segment.request_id] for segment in segments]
        table_rows = [state.table_row for state in states]
        arrays = StepArrays.of(segments, table_rows, self._tables.array, self._kv_store.chunk_size)
        sampling = [
            state.sampling
            for state, segment in zip(states, segments, strict=True)
            if segment.samples and state.sampling is not None
        ]
        batch = SamplingBatch(sampling, self._loaded.vocab_size)
        # A graph cannot wait for layers whose KV is on its way, and its layers would not be beside the copies.
        size = None
        if arrays.is_decode_batch and wait_for_layer is None:
            size = self._graphs.size_for(arrays.num_tokens)
        if size is not None:
            arrays = arrays.padded(size)
        sampled = {"sampled": arrays.sampled, "sampled_rows": arrays.sampled_rows}
        tensors = self._staging.send({**arrays.batch(), **sampled, **self._tables.changes(), **batch.arrays})
        self._tables.apply(tensors)
        if size is not None:
            logits = self._graphs.replay(size)[tensors["sampled"]]
        else:
            logits = self._forward(arrays, tensors, wait_for_layer)
        return logits, batch, tensors

    @torch.inference_mode()
    def _sample(
        self, logits: torch.Tensor, batch: SamplingBatch, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[tuple[int, ...], tuple[Logprobs | None, ...]]:
        """The next tokens, and their log-probabilities as StepResult has them. This is where a step waits for the device."""
        draw = batch.draw(logits, tensors)
        result = draw.finish()
        self._last_tokens.index_copy_(0, tensors["sampled_rows"], draw.token_ids)
        return result

    def _forward(
        self,
        arrays: StepArrays,
        tensors: Mapping[str, torch.Tensor],
        wait_for_layer: Callable[[int], None] | None,
    ) -> torch.Tensor:
        """Logits [number of sampling segments, vocabulary]. Writes the KV of all rows."""
        metadata = AttentionMetadata(
            slot_mapping=tensors["slot_mapping"],
            segments=tensors["segments"],
            block_tables=self._tables.tensor,
            chunk_size=self._kv_store.chunk_size,
            host_segments=arrays.segments,
        )
        token_ids = self._token_ids(tensors) if arrays.continues else tensors["token_ids"]
        return self._run_model(token_ids, tensors, metadata, wait_for_layer, logits_to_keep=tensors["sampled"])

    def _decode_step(self, size: int) -> Callable[[], torch.Tensor]:
        """A function of what lies in the places of a decode batch of `size` rows then: logits [size, vocabulary]."""
        arrays = StepArrays.padding(size)
        tensors = self._staging.send(arrays.batch())
        metadata = AttentionMetadata(
            slot_mapping=tensors["slot_mapping"],
            segments=tensors["segments"],
            block_tables=self._tables.tensor,
            chunk_size=self._kv_store.chunk_size,
            is_decode_batch=True,
        )
        return partial(self._run_decodes, tensors, metadata)

    def _run_decodes(self, tensors: Mapping[str, torch.Tensor], metadata: AttentionMetadata) -> torch.Tensor:
        return self._run_model(self._token_ids(tensors), tensors, metadata, None)

    def _token_ids(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tokens of the batch, those among them that were sampled before."""
        token_ids = tensors["token_ids"]
        return torch.where(token_ids < 0, self._last_tokens[tensors["table_rows"]], token_ids)

    def _run_model(
        self,
        token_ids: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        metadata: AttentionMetadata,
        wait_for_layer: Callable[[int], None] | None,
        **options: torch.Tensor,
    ) -> torch.Tensor:
        attention = PagedAttention(self._backend, metadata, self._kv_store.layer_pools, wait_for_layer)
        with attention_handled_by(attention):
            logits: torch.Tensor = self._loaded.model(
                input_ids=token_ids[None], position_ids=tensors["positions"][None], use_cache=False, **options
            ).logits[0]
        assert attention.num_calls == len(self._kv_store.layer_pools), "a layer did not attend"
        return logits


def _sampling_state(start: RequestStart) -> SamplingState:
    return SamplingState(
        start.sampling, start.num_tokens, start.num_prompt_tokens, start.stop_token_ids, start.token_ids
    )
