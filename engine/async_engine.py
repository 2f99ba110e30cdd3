"""The engine as a server uses it: one thread that steps, an asyncio facade that streams. Knows no HTTP and no Ray.

event loop                                   engine thread                     executor's thread    device
generate() -- tokenise, queue a command -->  core.add_request                                       step n
                                             schedule step n+1  -- plan -->    launch step n+1         :
           <-- OutputDelta, one wake-up ---  text of step n-1                                          :
                                             update             <-- result --  complete step n      step n+1
cancelled  -- queue a command ------------>  core.abort                                                :

Where the result of step n decides what step n+1 is, that is drafted meanwhile, and launched when the result is there.
Without `async_scheduling`, the engine thread executes the step itself, makes its text, and then schedules the next one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import secrets
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from engine.cache_view import CacheQuery, CacheView, CacheWatch
from engine.config import EngineConfig
from engine.core.executor import ComputationFailedError, Executor
from engine.core.plan import StepPlan, StepResult
from engine.core.request import Request, SamplingParams
from engine.errors import (
    ContextLengthError,
    EngineError,
    EngineStoppedError,
    ExecutorError,
    InvalidParameterError,
    OverloadedError,
)
from engine.executor.group import make_executor
from engine.executor.local import LocalExecutor
from engine.make_core import make_core
from engine.model_files import choose_model, default_model_name, model_location
from engine.tenant import LOCAL_TENANT, Tenant
from engine.text.output import OutputDelta, merge_deltas
from engine.text.output_processor import OutputProcessor, Stream
from engine.text.prompt import AnswerBeginning, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_pool import TokenizerPool
from engine.text.transcript import NO_MATCH, ConversationTable, Transcript

logger = logging.getLogger(__name__)

# Steps in a row that may fail before the engine says that it is broken: one may be the request's fault.
MAX_FAILURES_IN_A_ROW = 3
# After so long in one step the engine says that it hangs, in seconds. No step is that slow, not even one that compiles.
MAX_STEP_S = 300.0
# Least time between two log lines with the statistics, in seconds.
LOG_INTERVAL_S = 10.0
# Characters that are tokenised in the event loop itself, about a millisecond's worth.
MAX_INLINE_CHARS = 4096
# Memory for what conversations have said, their texts and token ids; about.
MAX_CONVERSATION_BYTES = 1 << 28


class AsyncEngine:
    """One engine. Thread-safe where asyncio is: call it from any event loop."""

    def __init__(
        self, config: EngineConfig, make_executor: Callable[[EngineConfig], LocalExecutor] = make_executor
    ) -> None:
        """Loads the model and starts the engine thread; blocking. make_executor: as many ranks as the config wants, on this
        machine, unless another one starts them elsewhere. Raises ModelLoadError or ConfigError."""
        config = replace(config, model=choose_model(config.model))
        self.config = config
        location = model_location(config.model)
        self.model_name = config.served_model_name or default_model_name(config.model)
        executor = make_executor(config)
        self._tokenizer = Tokenizer(location)
        self._executor: Executor = executor
        loaded = executor.loaded
        self._is_overlapped = (
            loaded.device.type != "cpu" if config.async_scheduling is None else config.async_scheduling
        )
        # Equal for two engines of which one may go on with an answer that the other has begun: its ids mean the same, and it
        # is the same model, in whatever dtype and by whatever version of the code.
        self.identity = f"{config.model} {self._tokenizer.fingerprint}"
        self._vocab_size = loaded.vocab_size
        self._bytes_per_block = executor.bytes_per_block
        eos_token_id = self._tokenizer.eos_token_id
        self._eos_token_ids = tuple({*loaded.eos_token_ids, *([] if eos_token_id is None else [eos_token_id])})
        self._core = make_core(config, executor)
        self.max_model_len = self._core.scheduling_config.max_model_len
        self._conversations = ConversationTable(MAX_CONVERSATION_BYTES, self._tokenizer.cut_tokens)
        self._tokenizer_pool = TokenizerPool(config.max_num_queued_reqs)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outputs = OutputProcessor(self._core, self._tokenizer, self._conversations)
        self._cache_watch = CacheWatch(self._core, self._conversations, self._call, time.monotonic)
        self._num_failures = 0
        self._logged_s = time.monotonic()
        self._step_start_s: float | None = None  # None while there is nothing to do
        self._is_stopping = False
        self._is_shut_down = False
        self._fatal: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- the facade, in the caller's event loop ------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        request_id: str,
        session_id: str | None = None,
        tenant: Tenant = LOCAL_TENANT,
        history: Transcript | None = None,
        beginning: AnswerBeginning | None = None,
        return_prompt_token_ids: bool = False,
    ) -> AsyncIterator[OutputDelta]:
        """Stream the answer; what has piled up while the consumer was busy comes as one delta. Closing or cancelling the
        generator aborts the request.

        session_id: of the tenant's; two tenants share nothing. history: what the conversation has said, for an engine that
        has not heard it. beginning: go on from there; the counts of the deltas include it, their texts and tokens do not.

        Raises RequestError before the first delta where the request is at fault, OverloadedError before it where too many
        wait, EngineError at any time where the engine is at fault."""
        self.check_health()
        conversation_id = None if session_id is None else f"{tenant.tenant_id}\n{session_id}"
        room = self.max_model_len - (sampling.max_tokens or 1)
        # Another engine began with the ids that its history gave: whatever was said here since does not count.
        known_id = conversation_id if beginning is None else None
        if isinstance(prompt, TokenPrompt):
            transcript, is_known = self._check_token_ids(prompt), False
        elif prompt.num_chars > MAX_INLINE_CHARS:
            # A long prompt takes long to tokenise, and meanwhile the loop has others to serve.
            work = partial(self._tokenize, prompt, known_id, history, room)
            transcript, is_known = await self._tokenizer_pool.run(work, tenant, prompt.num_chars)
        else:
            transcript, is_known = self._tokenize(prompt, known_id, history, room)
        self._check_vocabulary(sampling.stop_token_ids, "stop_token_ids")
        if beginning is not None:
            self._check_vocabulary(beginning.token_ids, "beginning")
        if sampling.seed is None and not sampling.is_greedy:
            sampling = replace(sampling, seed=secrets.randbits(62))
        request = Request(
            request_id,
            transcript.token_ids,
            sampling,
            conversation_id=conversation_id,
            tenant=tenant.tenant_id,
            weight=tenant.weight,
            eos_token_ids=self._eos_token_ids,
            output_token_ids=() if beginning is None else beginning.token_ids,
        )
        detokenizer = self._tokenizer.detokenizer(sampling.stop)
        if beginning is not None:
            detokenizer.resume(beginning.token_ids, beginning.num_chars)
        stream = Stream(request, transcript, detokenizer, asyncio.get_running_loop())
        is_first, is_finished = True, False
        try:
            await self._call(lambda: self._add(stream))
            while not is_finished:
                items = [await stream.items.get()]
                while not stream.items.empty():
                    items.append(stream.items.get_nowait())
                deltas = [item for item in items if isinstance(item, OutputDelta)]
                failure = next((item for item in items if isinstance(item, EngineError)), None)
                if deltas:
                    delta = merge_deltas(deltas)
                    if is_first and return_prompt_token_ids:
                        delta = replace(delta, prompt_token_ids=tuple(transcript.token_ids))
                    if is_first and is_known:
                        delta = replace(delta, prompt_transcript=transcript)
                    is_first = False
                    is_finished = delta.finish_reason is not None
                    yield delta
                if failure is not None:
                    is_finished = True
                    raise failure
        finally:
            if not is_finished:
                self._commands.put(lambda: self._outputs.abandon(stream))

    @property
    def has_chat_template(self) -> bool:
        """Whether the model is made for chats; else their messages are rendered as plain lines."""
        return self._tokenizer.has_chat_template

    def get_statistics(self) -> dict[str, Any]:
        """Counters since the start and the state now; see EngineCore.get_statistics.

        num_awaited_swap_out_bytes: of num_swap_out_bytes, those that a step needed the room of (evictions): its computation
        waited for their copies, while others run beside it.
        """
        statistics = self._core.get_statistics()
        return {
            "mode": self.config.mode,
            "model": self.model_name,
            "max_model_len": self.max_model_len,
            "num_conversations": len(self._conversations),
            **statistics,
            "num_swap_in_bytes": statistics["num_swap_ins"] * self._bytes_per_block,
            "num_swap_out_bytes": statistics["num_swap_outs"] * self._bytes_per_block,
            "num_awaited_swap_out_bytes": statistics["evictions"]["gpu_swapped_out"] * self._bytes_per_block,
        }

    async def map_cache(self, query: CacheQuery) -> CacheView:
        """Where the chunks of the watchers' conversations lie now, and what was evicted since they watch. For each call two
        short commands run between steps; in between calls nothing does. Raises EngineStoppedError."""
        return await self._cache_watch.look(query, asyncio.to_thread)

    async def hold_back(self, *, gpu_blocks_left: int | None = None, cpu_blocks_left: int | None = None) -> None:
        """Leave only so many blocks of each tier in use, for a demonstration; None = all. What lies in the others is evicted
        as at any other time, and no answer changes. See CacheManager.hold_back. Raises EngineStoppedError."""
        config = self._core.cache_config

        def num_held(num_blocks: int, num_left: int | None) -> int:
            return 0 if num_left is None else max(0, num_blocks - num_left)

        num_gpu, num_cpu = (
            num_held(config.num_gpu_blocks, gpu_blocks_left),
            num_held(config.num_cpu_blocks, cpu_blocks_left),
        )
        await self._call(lambda: self._core.hold_back(num_gpu, num_cpu, time.monotonic()))

    def check_health(self) -> None:
        """Raises EngineStoppedError where no request can be served any more."""
        if self._fatal is not None:
            raise EngineStoppedError(f"the engine thread died: {self._fatal!r}")
        self._executor.check_health()
        if self._num_failures >= MAX_FAILURES_IN_A_ROW:
            raise EngineStoppedError(f"the last {self._num_failures} steps failed; see the log")
        if self._is_stopping:
            raise EngineStoppedError("the engine is shut down")
        start_s = self._step_start_s
        if start_s is not None and time.monotonic() - start_s > MAX_STEP_S:
            raise EngineStoppedError(f"the engine hangs: its last step began more than {MAX_STEP_S:g} seconds ago")

    async def check_integrity(self) -> None:
        """Raises AssertionError where the books of the cache do not balance; runs between two steps."""
        await self._call(self._core.check_integrity)

    async def shutdown(self) -> None:
        """End all requests with EngineStoppedError, stop the thread, free the model. May be called again."""
        self._is_stopping = True
        self._commands.put(lambda: None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._tokenizer_pool.shutdown)
        if not self._is_shut_down:
            self._is_shut_down = True
            self._executor.shutdown()

    # -- tokenising ----------------------------------------------------------------------------------------------------

    def _tokenize(
        self, prompt: ChatPrompt | TextPrompt, conversation_id: str | None, history: Transcript | None, room: int
    ) -> tuple[Transcript, bool]:
        """The prompt as token ids, and whether earlier turns of the conversation gave some of them. Any thread may call it.

        room: how many tokens a prompt is to have that can be shortened. Raises ContextLengthError for one that does not fit
        the window, before anything is tokenised if that is clear."""
        if isinstance(prompt, TextPrompt):
            return self._encode(prompt.text, conversation_id, history, self.max_model_len, is_chat=False)
        if not prompt.drops_oldest:
            return self._encode_chat(prompt, conversation_id, history, self.max_model_len)
        try:
            return self._encode_chat(prompt, conversation_id, history, room)
        except ContextLengthError:
            shorter = prompt.shorter()
        fitting, low, high = None, 0, len(shorter)  # the longest one that fits is among these
        while low < high:
            middle = (low + high) // 2
            try:
                fitting, high = self._encode_chat(shorter[middle], conversation_id, history, room), middle
            except ContextLengthError:
                low = middle + 1
        return fitting or self._encode_chat((prompt, *shorter)[-1], conversation_id, history, self.max_model_len)

    def _encode_chat(
        self, prompt: ChatPrompt, conversation_id: str | None, history: Transcript | None, max_tokens: int
    ) -> tuple[Transcript, bool]:
        if len(prompt.messages) > max_tokens:  # each has a token at least
            raise ContextLengthError(
                f"the context window is {max_tokens} tokens, but the prompt has {len(prompt.messages)} messages; "
                "leave some out"
            )
        text = self._tokenizer.render_chat(prompt.messages)
        return self._encode(text, conversation_id, history, max_tokens, is_chat=True)

    def _encode(
        self, text: str, conversation_id: str | None, history: Transcript | None, max_tokens: int, *, is_chat: bool
    ) -> tuple[Transcript, bool]:
        tokenizer, known = self._tokenizer, NO_MATCH
        fingerprint = tokenizer.fingerprint if is_chat else tokenizer.text_fingerprint
        if conversation_id is not None:
            known = self._conversations.match_text(conversation_id, text, fingerprint)
        if history is not None and fingerprint and history.fingerprint == fingerprint:
            told = history.match_text(text, tuple(tokenizer.cut_tokens.values()))
            if told.num_chars > known.num_chars and max(told.token_ids) < self._vocab_size:
                known = told
        transcript = tokenizer.encode_prompt(text, known, is_chat=is_chat, max_tokens=max_tokens)
        return transcript, known.num_chars > 0

    def _check_token_ids(self, prompt: TokenPrompt) -> Transcript:
        """Raises ContextLengthError or InvalidParameterError."""
        if len(prompt.token_ids) > self.max_model_len:
            raise ContextLengthError(
                f"the context window is {self.max_model_len} tokens, but the prompt has {len(prompt.token_ids)}; shorten it"
            )
        self._check_vocabulary(prompt.token_ids, "prompt")
        return Transcript(array("I", prompt.token_ids), "")

    def _check_vocabulary(self, token_ids: Sequence[int], param: str) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidParameterError(
                    f"token id {token_id} is outside the vocabulary (0 to {self._vocab_size - 1})", param=param
                )

    # -- the engine thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        in_flight: deque[tuple[StepPlan, Callable[[], StepResult]]] = deque()
        try:
            while not self._is_stopping:
                self._step_start_s = time.monotonic()
                self._run_commands(wait=False)
                plan = None if in_flight else self._core.schedule(time.monotonic())
                if plan is not None:
                    in_flight.append((plan, self._begin_step(plan)))
                if not in_flight:
                    self._outputs.deliver()
                    if not self._is_stopping:  # a shutdown's wake-up call may have been taken already
                        self._step_start_s = None
                        self._run_commands(wait=True)
                    continue
                if self._is_overlapped:
                    # While the device computes: the step behind it, and the text of the step before.
                    ahead = self._look_ahead(in_flight[0][0])
                    if ahead is not None:
                        in_flight.append((ahead, self._begin_step(ahead)))
                    self._outputs.deliver()
                self._finish_step(*in_flight.popleft())
                if not self._is_overlapped:
                    self._outputs.deliver()
        except BaseException as error:
            logger.exception("the engine thread died")
            self._fatal = error
        finally:
            stopped = EngineStoppedError("the engine stopped while the request was running")
            self._outputs.fail(list(self._outputs.streams), stopped)
            self._is_stopping = True
            self._run_commands(wait=False)

    def _run_commands(self, *, wait: bool) -> None:
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            command()
            wait = False

    def _begin_step(self, plan: StepPlan) -> Callable[[], StepResult]:
        """What waits for its result."""
        return self._executor.submit(plan).result if self._is_overlapped else partial(self._executor.execute, plan)

    def _look_ahead(self, executing: StepPlan) -> StepPlan | None:
        """The plan to put behind `executing`; else it is drafted."""
        if self._executor.max_steps_in_flight > 1:
            return self._core.schedule_ahead(time.monotonic())
        self._core.plan_ahead(executing)
        return None

    def _finish_step(self, plan: StepPlan, wait_for_result: Callable[[], StepResult]) -> None:
        try:
            result = wait_for_result()
        except Exception as error:
            self._executor.check_health()  # where it computes no further step, this thread ends
            logger.exception("step %d failed", plan.step_id)
            are_copies_made = isinstance(error, ComputationFailedError)
            failed = self._core.fail_step(plan, time.monotonic(), are_copies_made=are_copies_made)
            # A step behind a failed one may fail for the same requests, which have ended by then.
            self._num_failures += bool(failed) or not plan.segments
            self._outputs.fail(failed, ExecutorError(f"the step that computed this request failed: {error!r}"))
            return
        now = time.monotonic()
        num_computed = self._core.stats.num_computed_tokens
        self._outputs.add(self._core.update(plan, result, now))
        if self._core.stats.num_computed_tokens > num_computed:  # and not in vain, behind a step that failed
            self._num_failures = 0
        if now - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = now
            self._log_statistics()

    def _log_statistics(self) -> None:
        stats = self.get_statistics()
        logger.info(
            "running %d, waiting %d; prompt tokens: %d in GPU, %d in CPU, %d not loaded, %d dropped, %d new; output "
            "tokens %d; blocks free: GPU %d/%d, CPU %d/%d; swapped in %.1f MB, out %.1f MB; %d suspensions",
            stats["num_requests_running"],
            stats["num_requests_waiting"],
            stats["num_gpu_cached_tokens"],
            stats["num_cpu_cached_tokens"],
            stats["num_not_loaded_tokens"],
            stats["num_dropped_tokens"],
            stats["num_new_tokens"],
            stats["num_output_tokens"],
            stats["num_gpu_blocks_free"],
            stats["num_gpu_blocks"],
            stats["num_cpu_blocks_free"],
            stats["num_cpu_blocks"],
            stats["num_swap_in_bytes"] / 1e6,
            stats["num_swap_out_bytes"] / 1e6,
            stats["num_suspensions"],
        )

    def _add(self, stream: Stream) -> None:
        thrown_out = self._core.add_request(stream.request, time.monotonic())
        self._outputs.streams[stream.request.request_id] = stream
        if thrown_out:
            message = "others wait for their share of the queue, of which this tenant had more; try again later"
            self._outputs.fail(thrown_out, OverloadedError(message))

    async def _call(self, function: Callable[[], Any]) -> Any:
        """Run `function` in the engine thread between two steps; its result or exception."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked was cancelled meanwhile
            if self._is_stopping:
                future.set_exception(EngineStoppedError("the engine is shut down"))
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._commands.put(command)
        if self._is_stopping:  # the thread may have looked for commands for the last time
            self.check_health()
        return await asyncio.wrap_future(future)
