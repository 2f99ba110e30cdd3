"""Computes steps: plan to tensors, forward, logits of the last rows, sampling.

Between steps it keeps what a worker must know of each started request (block table, last token, sampling state) and
nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from engine.attention.device_health import check_device
from engine.attention.protocol import AttentionBackend, AttentionMetadata, to_device
from engine.attention.transformers_door import PagedAttention, attention_handled_by
from engine.core.executor_protocol import ComputationFailedError, Grammars, SamplingFailedError
from engine.core.plan import Logprobs, RequestStart, StepPlan, StepResult
from engine.errors import InvalidParameterError
from engine.executor.compiled_layers import never_compiling
from engine.executor.lora.adapters import Changes
from engine.executor.lora.layers import AdaptedRows
from engine.executor.model_loader import LoadedModel
from engine.executor.prompt_scores import PromptScores
from engine.executor.sampler import Draw, SamplingBatch, SamplingState
from engine.executor.step_graphs import GraphMaker, StepGraphs
from engine.executor.step_inputs import BlockTables, Staging, StepArrays, StepLimits
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.swapper import Swapper
from engine.grammar.interface import BrokenMatcher, Matcher

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _RequestState:
    """What is kept of a started request.

    table_row: of the request's block table, and of its last token.
    sampling: None on a rank that does not sample.
    adapter: what is added to the model's layers; None = nothing.
    """

    table_row: int
    sampling: SamplingState | None
    adapter: Changes | None = None


@dataclass(slots=True)
class _Step:
    """A step that was launched.

    error: of its computation.
    copy_error: of anything before that, or of its copies.
    failed_swap_ins: None as long as its copies may be in flight.
    adapted: rows with adapters.
    sampled: token ids and log-probabilities, as StepResult has them, once it is settled.
    failed_requests, prompt_logprobs, swap_seconds: as StepResult has them.
    """

    plan: StepPlan
    arrays: StepArrays | None = None
    batch: SamplingBatch | None = None
    draw: Draw | None = None
    scores: PromptScores | None = None
    adapted: Sequence[AdaptedRows] = ()
    has_logits: bool = False
    failed_swap_ins: tuple[int, ...] | None = None
    error: Exception | None = None
    copy_error: Exception | None = None
    is_settled: bool = False
    sampled: tuple[tuple[int, ...], tuple[Logprobs | None, ...]] = ((), ())
    failed_requests: tuple[tuple[str, str], ...] = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()
    swap_seconds: tuple[float, float] = (0.0, 0.0)


class ModelRunner:
    """One model (or one rank's shard of it) and its KV. Steps are launched and completed in order.

    A step may be launched before the one in front of it is complete: the tokens that it goes on from are on the device.

    num_forwards: of the model, what is replayed not counted.
    num_eager_forwards: of a model with compiled layers, those in which torch took layers as they were written, because
        its compiled code is not made for something about the step.
    swapper, graphs, prompt_graphs: may be exchanged between two steps, for measurements. graphs: of decodes alone, by their
        number. prompt_graphs: of all other steps, by rows.
    see_logits: called with the logits of each step before it samples, [rows that choose a token, vocabulary], which
        the next step may overwrite; None = nothing is called.
    grammars: where those of requests are found; None = no request may have one.
    """

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
        """Computes nothing yet.

        limits: with them, all that a step reads has its place on the device from the start, and reaches it in one copy;
            without, as on a CPU, tensors are made as they are needed.
        samples: False on the ranks that get their tokens from rank 0.
        """
        self._loaded = loaded
        self._samples = samples
        # Not complete yet, oldest first.
        self._launched: list[_Step] = []
        # Table rows of those that the last step sampled for, in order, one for each token.
        self._sampled_rows: list[int] = []
        self._backend = backend
        self._kv_store = kv_store
        self.swapper = swapper
        self._requests: dict[str, _RequestState] = {}
        if limits is None:
            self._tables = BlockTables()
        else:
            self._tables = BlockTables(limits.max_num_seqs, limits.num_blocks, loaded.device)
        # The token that each request sampled last, by table row. It stays on the device: the next step need not wait for it.
        self._last_tokens = torch.zeros(len(self._tables.array), dtype=torch.long, device=loaded.device)
        self._staging = Staging(loaded.device, limits)
        self.graphs, self.prompt_graphs = StepGraphs(), StepGraphs()
        # The batches of recorded steps with prompts, by size.
        self._refilled: dict[int, AttentionMetadata] = {}
        self._limits = limits
        # The one that recorded steps wait for.
        self._recorded_swapper: Swapper | None = None
        self.see_logits: Callable[[torch.Tensor], None] | None = None
        self.num_forwards = self.num_eager_forwards = 0
        self.grammars: Grammars | None = None

    def capture_graphs(self, maker: GraphMaker, sizes: Sequence[int], prompt_sizes: Sequence[int] = ()) -> None:
        """Record decode steps of these sizes and other steps of so many rows; needs limits, which none may exceed.

        Raises ConfigError if memory runs out.
        """
        self._recorded_swapper = self.swapper
        with torch.inference_mode():
            # The largest first: see StepGraphs.capture.
            self.prompt_graphs.capture(maker, prompt_sizes, self._prompt_step)
            self.graphs.capture(maker, sizes, self._decode_step)

    def drop_graphs(self) -> None:
        """Free what was recorded; the graphs hold the runner, and so all that it uses."""
        self.graphs, self.prompt_graphs = StepGraphs(), StepGraphs()
        self._refilled.clear()

    def execute(self, plan: StepPlan) -> StepResult:
        """One step; raises what `complete` raises."""
        self.launch(plan)
        return self.complete()

    def launch(self, plan: StepPlan) -> None:
        """Begin a step, behind those that were launched before. What fails shows in `complete`.

        Its work goes into the queues of the device, which is not waited for; a device without queues does it now.
        """
        if self._launched:
            self._finish_copies(self._launched[-1])  # the swapper knows one step at a time
        step = _Step(plan)
        self._launched.append(step)
        wait_for_layer = None
        try:
            self._follow(plan)
            wait_for_layer = self.swapper.begin(plan)
        except Exception as error:
            step.copy_error = error
            return
        try:
            self._sampled_rows = [
                self._requests[segment.request_id].table_row
                for segment in plan.segments
                for _ in range(segment.num_chosen)
            ]
            if plan.segments:
                self._prepare(step)
                self._run(step, wait_for_layer)
        except Exception as error:
            step.error = error

    def complete(self) -> StepResult:
        """Wait for the oldest step that was launched, and for its copies, whatever happened.

        Raises what went wrong: ComputationFailedError if all copies were made and brought what they should,
        DeviceFailedError if no further step can be computed.
        """
        step = self._launched[0]
        self._settle(step)
        del self._launched[0]
        if step.copy_error is not None or step.error is not None:
            check_device(self._loaded.device)
        if step.copy_error is not None:
            raise step.copy_error
        if step.error is not None and not step.failed_swap_ins:
            kind = SamplingFailedError if step.has_logits else ComputationFailedError
            raise kind(repr(step.error)) from step.error
        if step.error is not None:
            raise step.error
        return StepResult(
            step.plan.step_id,
            *step.sampled,
            step.failed_swap_ins or (),
            step.failed_requests,
            step.prompt_logprobs,
            step.swap_seconds,
        )

    def note_sampled(self, token_ids: Sequence[int]) -> None:
        """Take in what rank 0 sampled in the last step, in the order of its segments; empty if that failed."""
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
                self._sampling_state(start) if self._samples else None,
                self._adapter(start.adapter),
            )
        for append in plan.appends:
            self._tables.append(self._requests[append.request_id].table_row, append.block_id)
        missing = len(self._tables.array) - len(self._last_tokens)
        if missing > 0:
            self._last_tokens = torch.cat([self._last_tokens, self._last_tokens.new_zeros(missing)])

    def _adapter(self, identity: str) -> Changes | None:
        """Held by the request from its start to its end, whatever is unloaded meanwhile."""
        adapters = self._loaded.adapters
        if adapters is None:
            assert not identity, "this executor has no adapters"
            return None
        return adapters.find(identity)

    def _sampling_state(self, start: RequestStart) -> SamplingState:
        return SamplingState(
            start.sampling,
            start.num_tokens,
            start.num_prompt_tokens,
            start.stop_token_ids,
            start.token_ids,
            self._matcher(start),
        )

    def _matcher(self, start: RequestStart) -> Matcher | None:
        """Behind what there is of the answer. A grammar that cannot be used is the fault of its own request alone."""
        spec, thinking = start.sampling.grammar, start.sampling.thinking_limit
        if spec is None and thinking is None:
            return None
        if self.grammars is None:
            return BrokenMatcher("this executor was given no grammars")
        try:
            matcher: Matcher = self.grammars.matcher(spec, start.token_ids[start.num_prompt_tokens :], thinking)
            return matcher
        except InvalidParameterError as error:
            return BrokenMatcher(error.message)

    def _prepare(self, step: _Step) -> None:
        """Make what a step reads, in host memory."""
        states = [self._requests[segment.request_id] for segment in step.plan.segments]
        samplers: list[SamplingState] = []
        for state, segment in zip(states, step.plan.segments, strict=True):
            if segment.samples and state.sampling is not None:
                if state.sampling.chosen_behind:
                    state.sampling.go_on_from(segment.context_len - segment.num_guesses)
                samplers.append(state.sampling)
                if segment.num_guesses:
                    samplers += state.sampling.behind(segment.guesses)
        if any(sampler.params.needs_token_ids for sampler in samplers):
            for earlier in self._launched[:-1]:
                self._settle(earlier)  # which tokens were sampled has to be known
        table_rows = [state.table_row for state in states]
        step.arrays = StepArrays.of(step.plan.segments, table_rows, self._tables.array, self._kv_store.chunk_size)
        if self._loaded.adapters is not None and any(state.adapter is not None for state in states):
            step.adapted = self._loaded.adapters.rows_of(
                [state.adapter for state in states],
                step.arrays.segments,
                lambda rows: to_device(torch.from_numpy(rows), self._loaded.device),
            )
        step.batch = SamplingBatch(samplers, self._loaded.vocab_size)
        for sampler in samplers:
            sampler.expect_token()

    @torch.inference_mode()
    def _run(self, step: _Step, wait_for_layer: Callable[[int], None] | None) -> None:
        """Put the computation of a step into the queue."""
        arrays, batch = step.arrays, step.batch
        assert arrays is not None
        assert batch is not None
        kept_rows = np.concatenate([arrays.sampled, arrays.scored])
        num_kept = len(kept_rows)
        size, prompt_size = self._recorded_sizes(arrays, num_kept, wait_for_layer, step.adapted)
        if size is not None:
            arrays = arrays.padded(size, size)
        elif prompt_size is not None:
            assert self._limits is not None
            segments = arrays.segments
            arrays = arrays.padded(prompt_size, self._limits.max_num_seqs + 1)
            kept_rows = np.pad(kept_rows, (0, self._limits.max_kept_rows - num_kept))
        kept = {"kept": kept_rows, "sampled_rows": arrays.sampled_rows}
        if len(arrays.targets):
            kept["targets"] = arrays.targets
        tensors = self._staging.send({**arrays.batch(), **kept, **self._tables.changes(), **batch.arrays})
        self._tables.apply(tensors)
        if size is None and prompt_size is None:
            logits = self._forward(arrays, tensors, wait_for_layer, step.adapted)
        elif size is not None:
            self.swapper.put_in()
            logits = self.graphs.replay(size)[tensors["kept"]]
        else:
            assert prompt_size is not None
            for derived in self._refilled[prompt_size].derived.values():
                derived.refill(segments)
            self.swapper.put_in()
            logits = self.prompt_graphs.replay(prompt_size)[:num_kept]
        step.has_logits = True
        if self._samples:
            num_sampled = len(arrays.sampled)
            if batch.has_masks:  # made while a device computes what is in its queue
                tensors |= self._staging.send_apart(batch.make_masks())
            step.draw = self._sample(logits[:num_sampled], batch, tensors)
            if "targets" in tensors:
                step.scores = PromptScores(logits[num_sampled:], tensors["targets"], self._nums_top(step.plan))

    def _recorded_sizes(
        self,
        arrays: StepArrays,
        num_kept: int,
        wait_for_layer: Callable[[int], None] | None,
        adapted: Sequence[AdaptedRows],
    ) -> tuple[int | None, int | None]:
        """Return the recorded size of decodes, or else that of any steps, that a step fits into.

        What is recorded adds no adapters, and keeps the logits of a limited number of rows. It waits for KV on its
        way if it was recorded with this swapper.
        """
        can_wait = self.swapper is self._recorded_swapper and self.swapper.gate is not None
        if adapted or (wait_for_layer is not None and not can_wait):
            return None, None
        size = self.graphs.size_for(arrays.num_tokens) if arrays.is_decode_batch else None
        if size is not None or self._limits is None:
            return size, None
        if num_kept > self._limits.max_kept_rows or len(arrays.segments) > self._limits.max_num_seqs:
            return None, None
        return None, self.prompt_graphs.size_for(arrays.num_tokens)

    def _sample(self, logits: torch.Tensor, batch: SamplingBatch, tensors: Mapping[str, torch.Tensor]) -> Draw:
        """Choose the next tokens, and keep them for the step behind."""
        if self.see_logits is not None:
            self.see_logits(logits)
        draw = batch.draw(logits, tensors)
        self._last_tokens.index_copy_(0, tensors["sampled_rows"], draw.token_ids)
        return draw

    def _nums_top(self, plan: StepPlan) -> list[int]:
        """For each target of a plan, how many tokens its request wants to know besides."""
        nums = []
        for segment in plan.segments:
            if segment.targets:
                state = self._requests[segment.request_id].sampling
                assert state is not None
                nums += [state.params.prompt_logprobs or 0] * len(segment.targets)
        return nums

    def _finish_copies(self, step: _Step) -> None:
        """Finish the copies of the step that was launched last."""
        if step.failed_swap_ins is None:
            step.failed_swap_ins = ()
            try:
                step.failed_swap_ins = self.swapper.finish()
                step.swap_seconds = self.swapper.seconds
            except Exception as error:
                step.copy_error = step.copy_error or error

    @torch.inference_mode()
    def _settle(self, step: _Step) -> None:
        """Wait for a step whose predecessors are all settled; raises nothing.

        This is where the host waits for the device.
        """
        if step.is_settled:
            return
        step.is_settled = True
        self._finish_copies(step)
        if step.draw is None or step.error is not None:
            return
        try:
            step.sampled = step.draw.finish()
            self._keep_chosen(step)
            if step.scores is not None:
                step.prompt_logprobs = step.scores.finish()
            step.failed_requests = self._failed_requests(step)
            if step.draw.was_corrected:
                self._correct(step)
        except Exception as error:
            step.error = error

    def _keep_chosen(self, step: _Step) -> None:
        """Keep what was chosen behind guesses. How much of it is the answer's shows in what is computed next.

        Not all that follows true guesses is: see EngineCore._append_verified.
        """
        if not any(segment.num_guesses for segment in step.plan.segments):
            return
        token_ids = iter(step.sampled[0])
        for segment in step.plan.segments:
            chosen = tuple(islice(token_ids, segment.num_chosen))
            if segment.num_guesses:
                state = self._requests[segment.request_id].sampling
                assert state is not None
                state.chosen_behind = chosen[1:]

    def _failed_requests(self, step: _Step) -> tuple[tuple[str, str], ...]:
        assert step.batch is not None
        if not step.batch.has_masks:
            return ()
        failed = []
        states, token_ids = iter(step.batch.states), iter(step.sampled[0])
        for segment in step.plan.segments:
            chosen = tuple(islice(token_ids, segment.num_chosen))
            # The first one is the request's own, the others are copies; those behind a wrong guess mean nothing.
            followed = tuple(islice(states, segment.num_chosen))[: 1 + segment.count_true(chosen)]
            errors = [state.matcher.error for state in followed if state.matcher is not None]
            error = next((error for error in errors if error is not None), None)
            if error is not None:
                failed.append((segment.request_id, error))
        return tuple(failed)

    def _correct(self, step: _Step) -> None:
        """Compute the steps behind this one again, because they began with other tokens than it has after all.

        They write the same KV to the same places, but for what came of the wrong tokens.
        """
        assert step.draw is not None
        assert step.arrays is not None
        rows = torch.from_numpy(step.arrays.sampled_rows).to(self._last_tokens.device)
        self._last_tokens.index_copy_(0, rows, step.draw.token_ids)
        for later in self._launched[self._launched.index(step) + 1 :]:
            self._finish_copies(later)
            if later.batch is not None and later.copy_error is None and later.error is None:
                try:
                    self._run(later, None)
                except Exception as error:
                    later.error = error

    def _forward(
        self,
        arrays: StepArrays,
        tensors: Mapping[str, torch.Tensor],
        wait_for_layer: Callable[[int], None] | None,
        adapted: Sequence[AdaptedRows],
    ) -> torch.Tensor:
        """Logits [rows of the batch that sample, and those that are scored, vocabulary]. Writes the KV of all rows."""
        metadata = self._metadata(tensors, host_segments=arrays.segments)
        token_ids = self._token_ids(tensors) if arrays.continues else tensors["token_ids"]
        options = {"logits_to_keep": tensors["kept"]}
        if not adapted or self._loaded.adapters is None:
            return self._run_model(token_ids, tensors, metadata, wait_for_layer, **options)
        running = self._loaded.adapters.layers.step
        running.parts = adapted
        try:
            return self._run_model(token_ids, tensors, metadata, wait_for_layer, **options)
        finally:
            running.parts = ()

    def _metadata(self, tensors: Mapping[str, torch.Tensor], **options: Any) -> AttentionMetadata:
        return AttentionMetadata(
            slot_mapping=tensors["slot_mapping"],
            segments=tensors["segments"],
            block_tables=self._tables.tensor,
            chunk_size=self._kv_store.chunk_size,
            **options,
        )

    def _decode_step(self, size: int) -> Callable[[], torch.Tensor]:
        """A function that computes a decode batch of `size` rows: logits [size, vocabulary].

        It reads the inputs from where they lie at each call.
        """
        tensors = self._staging.send(StepArrays.padding(size, size).batch())
        metadata = self._metadata(tensors, is_decode_batch=True)
        return partial(self._run_decodes, tensors, metadata)

    def _run_decodes(self, tensors: Mapping[str, torch.Tensor], metadata: AttentionMetadata) -> torch.Tensor:
        return self._run_model(self._token_ids(tensors), tensors, metadata, self.swapper.gate)

    def _prompt_step(self, num_rows: int) -> Callable[[], torch.Tensor]:
        """A function that computes any step of up to `num_rows` rows: logits of the rows that are kept.

        As `_decode_step`; the logits are [most rows, vocabulary].
        """
        assert self._limits is not None
        arrays = StepArrays.padding(num_rows, self._limits.max_num_seqs + 1)
        kept = np.zeros(self._limits.max_kept_rows, np.int64)
        tensors = self._staging.send({**arrays.batch(), "kept": kept})
        metadata = self._refilled[num_rows] = self._metadata(tensors, is_refilled=True)
        return partial(self._run_prompts, tensors, metadata)

    def _run_prompts(self, tensors: Mapping[str, torch.Tensor], metadata: AttentionMetadata) -> torch.Tensor:
        token_ids = self._token_ids(tensors)
        return self._run_model(token_ids, tensors, metadata, self.swapper.gate, logits_to_keep=tensors["kept"])

    def _token_ids(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The token ids of the batch, including those that were sampled in the step before."""
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
        stance = never_compiling() if self._loaded.has_compiled_layers else nullcontext()
        with attention_handled_by(attention), stance:
            logits: torch.Tensor = self._loaded.model(
                input_ids=token_ids[None], position_ids=tensors["positions"][None], use_cache=False, **options
            ).logits[0]
        assert attention.num_calls == len(self._kv_store.layer_pools), "a layer did not attend"
        self.num_forwards += 1
        if self._loaded.has_compiled_layers and attention.num_compiled_calls < attention.num_calls:
            self.num_eager_forwards += 1
            if self.num_eager_forwards == 1:
                logger.warning(
                    "a forward of %d rows ran %d of its %d layers without compiled code, and slower: torch found that it is "
                    "not made for them (TORCH_LOGS=recompiles says why); others that do are not reported",
                    len(token_ids),
                    attention.num_calls - attention.num_compiled_calls,
                    attention.num_calls,
                )
        return logits
