"""The engine as a server uses it: an asyncio facade over the thread that steps.

Knows no HTTP and no Ray.

event loop                                   engine thread                     executor's thread    device
generate() -- tokenise, queue a command -->  core.add_request                                       step n
                                             schedule step n+1  -- plan -->    launch step n+1         :
           <-- OutputDelta, one wake-up ---  text of step n-1                                          :
                                             update             <-- result --  complete step n      step n+1
cancelled  -- queue a command ------------>  core.abort                                                :

If the result of step n decides what step n+1 is, that step is drafted meanwhile, and launched when the result is there.
Without `async_scheduling`, the engine thread executes the step itself, makes its text, and then schedules the next one.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.adapters import LoadedAdapters, adapter_of
from engine.answer_grammar import thinking_span
from engine.answer_grammars import AnswerGrammars
from engine.cache_view import CacheQuery, CacheView, CacheWatch
from engine.cold_error import TEXT, log_cold_error
from engine.config import EngineConfig
from engine.core.executor_protocol import Executor
from engine.core.plan import ChunkRecord
from engine.core.request import Request, SamplingParams
from engine.core.retention import ConversationCache, RetentionHint, RetentionOutcome
from engine.core.thinking import ThinkingLimit, ThinkingSpan
from engine.core.tier_table import FAST_TIERS
from engine.dialogue.events import parse_answer
from engine.engine_thread import EngineThread
from engine.errors import OverloadedError
from engine.executor.group import make_executor
from engine.explanation import explain
from engine.generation import Generation
from engine.grammar.interface import GrammarCompiler, Vocabulary
from engine.grammar.store import GrammarStore
from engine.grammar.thinking import ThinkingScanner
from engine.kept_state import KeptState, NextPeers, no_peers
from engine.kv_events import KvEventPublisher
from engine.make_core import make_core
from engine.model_files import choose_model, default_model_name, model_location
from engine.peer_network import PeerNetwork
from engine.retention import ConversationRetention
from engine.statistics_log import StatisticsLog
from engine.step_loop import StepLoop, choose_look_ahead
from engine.text.comparisons import NOT_FOUND, CacheComparison
from engine.text.logprobs import check_prompt_logprobs, tell_prompt_in_time
from engine.text.output import OutputDelta, ToldPrompt
from engine.text.output_processor import OutputProcessor, Stream
from engine.text.prompt import ChatPrompt, TextPrompt
from engine.text.prompt_encoder import EncodedPrompt, PromptEncoder
from engine.text.tokenizer import Tokenizer
from engine.trace_recorder import TraceRecorder


class AsyncEngine:
    """One engine. Thread-safe where asyncio is: call it from any event loop.

    model_name: what clients ask for.
    max_model_len: the window in tokens, prompt and answer.
    identity: equal for two engines of which one may go on with an answer that the other has begun: its token ids mean the
        same, and it is the same model, in whatever dtype and by whatever version of the code.
    """

    def __init__(
        self,
        config: EngineConfig,
        make_executor: Callable[[EngineConfig], Executor] = make_executor,
        number: int = 0,
        network: PeerNetwork | None = None,
    ) -> None:
        """Load the model and start the engine thread; blocking.

        make_executor: starts the ranks that the config wants, by default on this machine.
        number: of this engine among those with one kv_disk_path; restarted with the same one, it finds what it had.
        network: for engines that hand KV over to each other; None = this one does not.

        Raises ModelLoadError or ConfigError.
        """
        config = replace(config, model=choose_model(config.model))
        self.config = config
        location = model_location(config.model)
        self.model_name = config.served_model_name or default_model_name(config.model)
        executor = make_executor(config)
        kept: KeptState | None = None
        recorder: TraceRecorder | None = None
        try:
            if config.record_trace is not None:
                recorder = TraceRecorder(Path(config.record_trace).expanduser(), number)
            self._tokenizer = Tokenizer(
                location, tool_call_parser=config.tool_call_parser, reasoning_parser=config.reasoning_parser
            )
            kept = KeptState(config, executor, number, network, self._tokenizer.cut_tokens)
            self._core = make_core(config, executor, kept.specs)
            self._adapters = LoadedAdapters(config, executor, self.model_name)
            if config.kv_cold_dtype != "same" and executor.facts.num_cpu_blocks:
                text = self._tokenizer.encode_marker(TEXT)
                max_tokens = config.max_num_batched_tokens
                log_cold_error(executor, text, config.chunk_size, max_tokens, config.kv_cold_dtype)
            self._kv_events: KvEventPublisher | None = None
            if config.kv_events_endpoint is not None:
                size = self._core.cache_config.chunk_size
                self._kv_events = KvEventPublisher(config.kv_events_endpoint, config.kv_events_topic, number, size)
        except BaseException:
            if kept is not None:
                kept.close()
            if recorder is not None:
                recorder.close()
            executor.shutdown()  # it may have other processes
            raise
        self._executor, self._kept, self._recorder = executor, kept, recorder
        self.identity = f"{config.model} {self._tokenizer.fingerprint}"
        facts = executor.facts
        self._bytes_per_block = facts.bytes_per_cold_block  # as it moves between tiers
        eos_token_id = self._tokenizer.eos_token_id
        self._eos_token_ids = tuple({*facts.model.eos_token_ids, *([] if eos_token_id is None else [eos_token_id])})
        self.max_model_len = self._core.scheduling_config.max_model_len
        self._conversations = kept.conversations
        self._prompts = PromptEncoder(
            self._tokenizer,
            self._conversations,
            max_model_len=self.max_model_len,
            vocab_size=facts.model.vocab_size,
            max_num_waiting=config.max_num_queued_reqs,
            restores_reasoning=config.preserve_reasoning == "auto",
        )
        self._grammars = GrammarStore(
            lambda: _start_compiler(self._tokenizer.vocabulary(facts.model.vocab_size, self._eos_token_ids)),
            self._tokenizer.token_bytes,
        )
        self._answer_grammars = AnswerGrammars(self._grammars, self._tokenizer.marker_ids, config.max_num_queued_reqs)
        executor.use_grammars(self._grammars)
        self._outputs = OutputProcessor(self._core, self._tokenizer, self._conversations)
        look_ahead = choose_look_ahead(config.async_scheduling, executor)

        def adapter_identity(conversation_id: str) -> str:
            return self._adapters.identity_of(adapter_of(conversation_id))

        peers = kept.join(self._core, lambda command: self._thread.put(command), adapter_identity)
        loop = StepLoop(self._core, executor, self._outputs, time.monotonic, look_ahead, kept.transport, peers)
        log = StatisticsLog(self.get_statistics)
        self._retention = ConversationRetention(
            self._core, self._conversations, self._call, time.monotonic, config.kv_hints, adapter_identity
        )
        if config.kv_hints != "off":
            self._outputs.note_end = self._retention.note_end
        self._thread = EngineThread(
            loop,
            after_step=log.write_if_due,
            on_end=self._outputs.fail_all,
            on_idle=self._retention.fill_holes,
        )
        kept.run(self._core, self._thread.put)
        if self._kv_events is not None:
            self._kv_events.start(lambda: self._thread.submit(lambda: self._core.watch_chunks().take()))
        self._cache_watch = CacheWatch(self._core, self._conversations, self._call, time.monotonic, adapter_identity)
        self._is_shut_down = False

    async def generate(self, generation: Generation) -> AsyncIterator[OutputDelta]:
        """Stream the answer; what has piled up while the consumer was busy comes as one delta.

        Closing or cancelling the generator aborts the request. Raises RequestError before the first delta if the request is
        at fault, OverloadedError before it if too many requests wait, EngineError at any time if the engine is at fault.
        """
        self.check_health()
        if generation.only_encodes:
            yield await self._encode_only(generation)
            return
        with self._adapters.used_by_request(generation.adapter, self._forget_adapter) as adapter:
            async with aclosing(self._answer(generation, adapter)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _answer(self, generation: Generation, adapter: str) -> AsyncGenerator[OutputDelta, None]:
        """adapter: its identity, held meanwhile."""
        begin_s, asked_s = time.time(), time.monotonic()
        stream, prompt = await self._open(generation, adapter)
        elsewhere = await self._kept.chunks_elsewhere(stream.request)
        is_first, is_finished, num_output_tokens = True, False, 0
        try:
            await self._call(lambda: self._add(stream, elsewhere))
            while not is_finished:
                delta = await stream.read()
                if is_first and generation.return_prompt_token_ids:
                    delta = replace(delta, prompt_token_ids=tuple(stream.prompt.token_ids))
                if is_first and (generation.return_prompt_text or generation.sampling.prompt_logprobs is not None):
                    delta = replace(delta, told_prompt=await self._tell_prompt(generation, stream))
                if is_first and generation.return_answer_format:
                    delta = replace(delta, answer_format=prompt.answer_format)
                if is_first and prompt.is_known:
                    delta = replace(delta, prompt_transcript=stream.prompt)
                is_first = False
                is_finished, num_output_tokens = delta.finish_reason is not None, delta.num_output_tokens
                if generation.explains and delta.stats is not None:
                    prepare_s = delta.stats.arrival_s - asked_s
                    delta = replace(delta, explanation=explain(begin_s, prepare_s, delta.stats, stream.request.misses))
                yield delta
        finally:
            if not is_finished:
                self._thread.put(lambda: self._outputs.abandon(stream))
            if self._recorder is not None:
                tenant_id, prompt_ids = generation.tenant.tenant_id, stream.prompt.token_ids
                self._recorder.record(tenant_id, generation.conversation_id, prompt_ids, num_output_tokens, begin_s)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """What Generation.adapter may be, besides empty."""
        return self._adapters.names

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter beside the requests; see docs/adapters.md. Raises AdapterError.

        folder: below the option adapter_folder.
        """
        await asyncio.to_thread(self._adapters.load, name, folder, self._forget_adapter)

    async def unload_adapter(self, name: str) -> None:
        """Take no further request with an adapter. Raises AdapterError.

        Those that it has go on; when the last one ends, the adapter's memory is freed.
        """
        self._forget_adapter(self._adapters.unload(name))

    def identity_with(self, adapter: str) -> str:
        """`identity` of the model with an adapter, by its name as of now."""
        return f"{self.identity} {self._adapters.identity_of(adapter)}" if adapter else self.identity

    @property
    def has_chat_template(self) -> bool:
        """Whether the model is made for chats; else their messages are rendered as plain lines."""
        return self._tokenizer.has_chat_template

    def get_statistics(self) -> dict[str, Any]:
        """Counters since the start and the state now; see EngineCore.get_statistics.

        num_awaited_swap_out_bytes: of num_swap_out_bytes, those of evictions: a step needed their blocks, so its computation
            waited for the copies, while other swap-outs run concurrently.
        num_slow_transfer_bytes: as slow_transfers, of those that went well.
        num_written_bytes: to the files of slow tiers, for chunks and for transcripts. For chunks, its ratio to what was
            stored is the write amplification.
        """
        statistics = self._core.get_statistics()
        return {
            "mode": self.config.mode,
            "model": self.model_name,
            "max_model_len": self.max_model_len,
            "num_conversations": len(self._conversations),
            "recomputed_tokens": dict(self._outputs.num_recomputed),
            "finish_reasons": dict(self._outputs.num_finished),
            **statistics,
            "num_swap_in_bytes": statistics["num_swap_ins"] * self._bytes_per_block,
            "num_swap_out_bytes": statistics["num_swap_outs"] * self._bytes_per_block,
            "num_awaited_swap_out_bytes": statistics["evictions"]["gpu_swapped_out"] * self._bytes_per_block,
            "num_slow_transfer_bytes": {
                outcome: count * self._bytes_per_block
                for outcome, count in statistics.get("slow_transfers", {}).items()
                if not outcome.endswith(("_failed", "_gone"))
            },
            "num_written_bytes": self._kept.written_bytes(),
            "handover_conversations": self._kept.handover_counts(),
            "tier_problems": self.tier_problems(),
        }

    @property
    def token_compute_s(self) -> tuple[float, float] | None:
        """What computing a context again costs, in seconds; see LoadPrices."""
        return self._core.token_compute_s

    @property
    def token_pull_s(self) -> float | None:
        """What a token's KV from a peer costs, in seconds; see EngineCore."""
        return self._core.token_pull_s

    def tier_problems(self) -> dict[str, str]:
        """Why a slow tier is not used at present, by its name; the engine serves without it and tries it again."""
        hanging = dict.fromkeys(self._core.hanging_tiers(time.monotonic()), "a transfer does not end")
        return hanging | self._kept.problems()

    async def map_cache(self, query: CacheQuery) -> CacheView:
        """Where the chunks of the watchers' conversations are now, and what was evicted since they watch.

        Each call runs two short commands between steps; nothing runs between calls. Raises EngineStoppedError.
        """
        return await self._cache_watch.look(query, asyncio.to_thread)

    async def retain(self, conversation_id: str, hint: RetentionHint) -> RetentionOutcome:
        """Keep what is cached of a conversation, or let it go; the hint holds for its later turns that bring none, too.

        A release holds until the next turn begins; the end of one that runs does not undo it. Raises EngineStoppedError.

        conversation_id: see Generation.
        """
        return await self._retention.retain(conversation_id, hint)

    async def cache_state(self, conversation_id: str) -> ConversationCache | None:
        """What is cached of a conversation; None if it is not known here. Raises EngineStoppedError."""
        return await self._retention.look(conversation_id)

    async def hold_back(self, *, gpu_blocks_left: int | None = None, cpu_blocks_left: int | None = None) -> None:
        """Leave only so many blocks of each tier in use, for a demonstration; None = all.

        The chunks in the other blocks are evicted as at any other time, and no answer changes; see Allocator.hold_back.
        Raises EngineStoppedError.
        """
        config = self._core.cache_config

        def num_held(num_blocks: int, num_left: int | None) -> int:
            return 0 if num_left is None else max(0, num_blocks - num_left)

        num_gpu, num_cpu = (
            num_held(config.num_gpu_blocks, gpu_blocks_left),
            num_held(config.num_cpu_blocks, cpu_blocks_left),
        )
        await self._call(
            lambda: self._core.hold_back(dict(zip(FAST_TIERS, (num_gpu, num_cpu), strict=True)), time.monotonic())
        )

    def check_health(self) -> None:
        """Raise EngineStoppedError if no request can be served any more."""
        self._thread.check_health()

    async def check_integrity(self) -> None:
        """Raise AssertionError if an invariant of the cache does not hold; runs between two steps."""
        await self._call(self._core.check_integrity)

    @property
    def peer_address(self) -> tuple[str, int] | None:
        """Where other engines reach this one; None = it hands no KV over."""
        return self._kept.peer_address

    def set_peers(self, peers: Mapping[str, tuple[str, int]], next_peers: NextPeers = no_peers) -> None:
        """Hear who the other engines are now, by id, and where. Any thread; returns at once.

        next_peers: of a conversation, by its id, the peers that may have its next turn; any thread may ask. They hear at once
            when a turn has ended here, and the others when they ask next.
        """
        self._kept.set_peers(peers, next_peers)

    async def hand_over(self, timeout_s: float, next_home: Callable[[str], str | None]) -> None:
        """Leave copies of what conversations have here to their next homes, beside the requests; see `drain`.

        For an engine that will be drained when its requests have ended: only what they change is left to do then.
        """
        await self._kept.hand_over(self._call, timeout_s, next_home)

    async def drain(self, timeout_s: float, next_home: Callable[[str], str | None] | None = None) -> None:
        """Bring what the tiers hold to the disk tier, if there is one, and to peers: the most valuable first.

        Takes at most so many seconds, and may be cut off at any time. No request may follow. Raises EngineStoppedError.

        next_home: of a conversation, by its id, the peer that gets it; None = none does.
        """
        await self._kept.drain(self._core, self._call, timeout_s, next_home)

    async def shutdown(self) -> None:
        """End all requests with EngineStoppedError, stop the thread, free the model. May be called again."""
        if self._kv_events is not None:
            await asyncio.to_thread(self._kv_events.close)
        await asyncio.to_thread(self._thread.stop)
        await asyncio.to_thread(self._prompts.shutdown)
        await asyncio.to_thread(self._answer_grammars.shutdown)
        await asyncio.to_thread(self._grammars.close)
        if not self._is_shut_down:
            self._is_shut_down = True
            await asyncio.to_thread(self._kept.close)
            if self._recorder is not None:
                await asyncio.to_thread(self._recorder.close)
            self._executor.shutdown()

    async def _encode(self, generation: Generation) -> EncodedPrompt:
        """The prompt as token ids."""
        beginning = generation.beginning
        if beginning is not None and beginning.prompt is not None:
            return self._prompts.take_prompt(generation.prompt, beginning.prompt, generation.cache_wish)
        if generation.conversation_id is not None and generation.beginning is None:
            await self._kept.recall(generation.conversation_id)
        return await self._prompts.encode(
            generation.prompt,
            tenant=generation.tenant,
            # Another engine began with the ids that its history gave: whatever was said here since does not count.
            conversation_id=generation.conversation_id if generation.beginning is None else None,
            history=generation.history,
            room=self.max_model_len - (generation.sampling.max_tokens or 1),
            wish=generation.cache_wish,
        )

    async def _encode_only(self, generation: Generation) -> OutputDelta:
        """What is told of a prompt that is not computed."""
        token_ids = (await self._encode(generation)).transcript.token_ids
        spell = self._prompts.spell
        text, names = await spell(token_ids, generation.tenant) if generation.spells_prompt else ("", ())
        return OutputDelta(
            text=text,
            prompt_token_ids=tuple(token_ids) if generation.return_prompt_token_ids else (),
            prompt_token_names=names,
            num_prompt_tokens=len(token_ids),
            finish_reason="stop",
        )

    async def _tell_prompt(self, generation: Generation, stream: Stream) -> ToldPrompt:
        """What the client is told of its prompt."""
        prompt, is_text = stream.prompt, isinstance(generation.prompt, TextPrompt)
        scores = None if generation.sampling.prompt_logprobs is None else stream.prompt_logprobs
        return await tell_prompt_in_time(self._tokenizer, prompt.token_ids, prompt.text, scores, is_text=is_text)

    async def _open(self, generation: Generation, adapter: str) -> tuple[Stream, EncodedPrompt]:
        """A stream for the answer, and the prompt."""
        sampling, beginning = generation.sampling, generation.beginning
        prompt = await self._encode(generation)
        if generation.clamps_max_tokens and sampling.max_tokens is not None:
            num_left = self.max_model_len - len(prompt.transcript.token_ids)
            sampling = replace(sampling, max_tokens=max(1, min(sampling.max_tokens, num_left)))
        self._prompts.check_vocabulary(sampling.stop_token_ids, "stop_token_ids")
        self._prompts.check_vocabulary([token_id for token_id, _ in sampling.logit_bias], "logit_bias")
        if beginning is not None:
            self._prompts.check_vocabulary(beginning.token_ids, "beginning")
        check_prompt_logprobs(len(prompt.transcript.token_ids), sampling.prompt_logprobs)
        if sampling.grammar is not None and prompt.answer_format is not None:
            prompt = prompt._replace(answer_format=replace(prompt.answer_format, calls_first=True))
        answer_format = prompt.answer_format if generation.return_answer_format else None
        spec, grammar = await self._answer_grammars.hold(generation, answer_format)
        if spec is not sampling.grammar:
            sampling = replace(sampling, grammar=spec)
        span = thinking_span(prompt.answer_format)
        sampling = self._limit_thinking(sampling, span)
        if sampling.seed is None and not sampling.is_greedy:
            sampling = replace(sampling, seed=secrets.randbits(62))
        hint = generation.retention or prompt.retention
        request = Request(
            generation.request_id,
            prompt.transcript.token_ids,
            sampling,
            conversation_id=generation.conversation_id,
            tenant=generation.tenant.tenant_id,
            adapter=adapter,
            weight=generation.tenant.weight,
            eos_token_ids=self._eos_token_ids,
            output_token_ids=() if beginning is None else beginning.token_ids,
            chunk_keys=self._conversations.find_chunk_keys(
                generation.conversation_id or "",
                prompt.transcript.token_ids,
                generation.tenant.tenant_id,
                self._core.cache_config.chunk_size,
                adapter,
            ),
            retention=hint or self._retention.hint_for(generation.conversation_id),
            is_prewarm=generation.prewarms,
            explains_misses=generation.explains_misses or generation.explains,
        )
        detokenizer = self._tokenizer.detokenizer(
            sampling.stop,
            keeps_markers=answer_format is not None,
            keeps_special=generation.shows_special_tokens,
            keeps_stop=generation.shows_stop_string,
        )
        thinking = None if span is None else ThinkingScanner(span, self._tokenizer.token_bytes)
        if beginning is not None:
            detokenizer.resume(beginning.token_ids, beginning.num_chars)
            if thinking is not None:
                thinking.accept_all(beginning.token_ids)
        stream = Stream(
            request, prompt.transcript, detokenizer, asyncio.get_running_loop(), grammar, thinking, prompt.chat
        )
        if isinstance(generation.prompt, ChatPrompt) and answer_format is not None:
            tools = generation.tool_choice.offered(generation.prompt.tools)
            stream.read_answer = lambda text: parse_answer(answer_format.parser(tools), text)
            stream.may_call = bool(tools)
        stream.recomputed, stream.log_id = prompt.recomputed, generation.log_id
        stream.hint, stream.num_lost_marks = hint, prompt.num_lost_marks
        if generation.cache_wish.compared_to is not None:
            stream.comparison = await self._compare(generation, prompt)
        return stream, prompt

    async def _compare(self, generation: Generation, prompt: EncodedPrompt) -> CacheComparison:
        """The prompt with the context of the earlier request that is named; a stranger's is not found."""
        tenant, compared_to = generation.tenant, generation.cache_wish.compared_to or ""
        context = self._outputs.recent.find(tenant.tenant_id, compared_to)
        if context is None:
            return NOT_FOUND
        return await self._prompts.compare(context, prompt, generation.prompt, tenant)

    def _limit_thinking(self, sampling: SamplingParams, span: ThinkingSpan | None) -> SamplingParams:
        """The same, with the limit of thinking as the executor keeps it. A model that does not think keeps any limit."""
        if span is None or sampling.max_thinking_tokens is None:
            return sampling
        closing_ids = self._tokenizer.encode_marker(span.closing)
        return replace(sampling, thinking_limit=ThinkingLimit(span, sampling.max_thinking_tokens, closing_ids))

    def _add(self, stream: Stream, elsewhere: Sequence[ChunkRecord]) -> None:
        """Queue the request of a stream; in the engine thread. elsewhere: what a peer has of its context."""
        now = time.monotonic()
        self._retention.note_start(stream.request)
        shed = self._core.add_request(stream.request, now)
        if elsewhere and self._core.handover is not None:
            self._core.handover.expect(elsewhere, stream.request.request_id, now)
        self._outputs.add_stream(stream)
        if shed:
            message = "dropped from the queue: this tenant exceeds its share of it; try again later"
            self._outputs.fail(shed, OverloadedError(message))

    def _forget_adapter(self, identity: str) -> None:
        """Unload it, unless it is used still, behind the commands that end its requests."""
        self._thread.put(
            lambda: self._adapters.forget(identity, lambda: self._core.abort_adapter(identity, time.monotonic()))
        )

    async def _call(self, function: Callable[[], Any]) -> Any:
        """Run `function` in the engine thread between two steps; its result or exception."""
        return await asyncio.wrap_future(self._thread.submit(function))


def _start_compiler(vocabulary: Vocabulary) -> GrammarCompiler:
    """A compiler of grammars, whose library is imported only now: most engines never get a grammar."""
    from engine.grammar.trial import TriedCompiler

    return TriedCompiler(vocabulary)
