"""From sampled tokens to text, and to the event loops that wait for it.

Owns the streams of the requests; only the engine thread calls it. Knows no scheduler and no device. Text is made by
`deliver`, while the next step is computed. Requests with stop strings are the exception: their text decides whether the
next step computes them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.plan import Logprobs
from engine.core.request import FinishReason, Request
from engine.core.retention import RetentionHint
from engine.dialogue.events import ParsedAnswer
from engine.errors import EngineError
from engine.grammar.interface import CompiledGrammar
from engine.grammar.thinking import ThinkingScanner
from engine.text.comparisons import CacheComparison, RecentContext, RecentContexts
from engine.text.detokenizer import Detokenizer
from engine.text.logprobs import token_logprob
from engine.text.output import OutputDelta, TokenLogprob, merge_deltas, with_unix_time
from engine.text.tokenizer import Tokenizer
from engine.text.transcript import ChunkNames, ConversationTable, Transcript
from engine.text.turns import REASONS, RecognisedChat

logger = logging.getLogger(__name__)

Item = OutputDelta | EngineError

# In the words of OpenAI's API.
FINISH_REASONS = (*(reason.value for reason in FinishReason), "tool_calls")


@dataclass(slots=True)
class Stream:
    """The way of one request's output, from the engine thread to the event loop that waits for it.

    prompt_logprobs: what the prompt's tokens were given, before the first delta; empty if that was not asked for.
    grammar: of its answer; held here, so that the executor finds it as long as the request lives.
    thinking: counts the tokens of thinking; None = there are none to count.
    chat: the messages of the prompt, and read_answer: what an answer's text says; None = it is no chat.
    may_call: it is offered tools.
    recomputed, hint, num_lost_marks, comparison: see OutputDelta.
    is_explained: the comparison says why tokens were computed.
    log_id: see Generation.
    """

    request: Request
    prompt: Transcript
    detokenizer: Detokenizer
    loop: asyncio.AbstractEventLoop
    grammar: CompiledGrammar | None = None
    thinking: ThinkingScanner | None = None
    chat: RecognisedChat | None = None
    read_answer: Callable[[str], ParsedAnswer] = ParsedAnswer
    may_call: bool = False
    recomputed: tuple[str, int] | None = None
    hint: RetentionHint | None = None
    num_lost_marks: int = 0
    comparison: CacheComparison | None = None
    is_explained: bool = False
    log_id: str = ""
    prompt_logprobs: tuple[Logprobs, ...] = ()
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)

    async def read(self) -> OutputDelta:
        """Wait for output; all that has piled up comes as one delta.

        Raises the error that ended the stream, if any.
        """
        items = [await self.items.get()]
        while not self.items.empty():
            items.append(self.items.get_nowait())
        deltas = [item for item in items if isinstance(item, OutputDelta)]
        if isinstance(items[-1], EngineError):
            if not deltas:
                raise items[-1]
            self.items.put_nowait(items[-1])  # for the next call
        return merge_deltas(deltas)


class OutputProcessor:
    """Holds what a step gave until `deliver`.

    Each stream gets all of its output, in order, before any error.

    streams: by the id of the request that runs or waits.
    note_end: told each request of a conversation that has ended, with the tool that its answer calls first ("" = none).
    num_recomputed: prompt tokens that conversations had and that were computed again, by reason: see text/turns.py.
    num_finished: answers by how they ended: FINISH_REASONS.
    recent: the contexts of the requests that ended last.
    """

    def __init__(self, core: EngineCore, tokenizer: Tokenizer, conversations: ConversationTable) -> None:
        self.streams: dict[str, Stream] = {}
        self.num_recomputed = dict.fromkeys(REASONS, 0)
        self.num_finished = dict.fromkeys(FINISH_REASONS, 0)
        self.recent = RecentContexts()
        self._core = core
        self._tokenizer = tokenizer
        self._conversations = conversations
        self.note_end: Callable[[Request, str], object] = lambda *_: None
        self._pending: list[tuple[Stream, RequestOutput]] = []  # without a text yet
        self._unsent: list[tuple[Stream, Item]] = []

    def add_stream(self, stream: Stream) -> None:
        """Take in the stream of a request that waits now."""
        self.streams[stream.request.request_id] = stream
        if stream.recomputed is not None:
            reason, num_tokens = stream.recomputed
            self.num_recomputed[reason] += num_tokens

    def add(self, outputs: Iterable[RequestOutput]) -> None:
        """Take in what a step gave.

        If a stop string may end an answer, its text is made now, so that the next step is planned without it.
        """
        for output in outputs:
            stream = self.streams.get(output.request_id)
            if stream is None:  # it only prepared a context
                continue
            if output.prompt_logprobs:
                stream.prompt_logprobs = output.prompt_logprobs
            if output.finish_reason is not None:
                del self.streams[output.request_id]  # from here on, another request may bear that id
            if stream.request.sampling.stop:
                self._unsent.append((stream, self._process(stream, output)))
            else:
                self._pending.append((stream, output))

    def deliver(self) -> None:
        """Make the text of what was taken in, and send everything."""
        pending, self._pending = self._pending, []
        items, self._unsent = self._unsent, []
        items += [(stream, self._process(stream, output)) for stream, output in pending]
        self._send(items)

    def fail(self, request_ids: Iterable[str], error: EngineError) -> None:
        """End the streams of these requests with an error; ids without a stream are ignored."""
        self.deliver()
        streams = [self.streams.pop(request_id, None) for request_id in request_ids]
        self._send([(stream, error) for stream in streams if stream is not None])

    def fail_all(self, error: EngineError) -> None:
        """End all streams with an error."""
        self.fail(list(self.streams), error)

    def abandon(self, stream: Stream) -> None:
        """Abort the request of a stream whose consumer left.

        Compares the stream and not the id: a rejected request may have the id of one that runs.
        """
        request_id = stream.request.request_id
        self.deliver()  # its text must be as far as its tokens
        if self.streams.get(request_id) is stream:
            del self.streams[request_id]
            self._core.abort(request_id, time.monotonic())
            self._remember(stream, self._read_answer(stream))

    def _process(self, stream: Stream, output: RequestOutput) -> Item:
        """As `_render`, but an answer that cannot be put into text ends alone, with an error."""
        try:
            return self._render(stream, output)
        except Exception as error:
            extra = {"request_id": stream.log_id} if stream.log_id else {}
            logger.exception("request %s failed", output.request_id, extra=extra)
            if self.streams.get(output.request_id) is stream:
                del self.streams[output.request_id]
                self._core.abort(output.request_id, time.monotonic())
            return EngineError(f"the answer could not be put into text: {error!r}")

    def _render(self, stream: Stream, output: RequestOutput) -> OutputDelta:
        """From a token to text; ends the request if a stop string is complete."""
        request, detokenizer = stream.request, stream.detokenizer
        reason, stats = output.finish_reason, output.stats
        logprobs = self._logprobs(output, detokenizer)
        if reason is not FinishReason.STOP:  # the token that ends an answer is not part of its text
            may_stop = output.num_output_tokens > request.sampling.min_tokens
            detokenizer.append(output.token_id, may_stop=may_stop)
        if detokenizer.is_stopped and reason is None:
            kept = detokenizer.num_whole_tokens()
            stats = self._core.stop(
                request.request_id,
                time.monotonic(),
                num_output_tokens=output.num_output_tokens,
                num_kept_output_tokens=kept,
            )
            del self.streams[request.request_id]
        if detokenizer.is_stopped:
            reason = FinishReason.STOP
        if stream.thinking is not None and not request.is_prewarm:
            stream.thinking.accept(output.token_id)
        self._explain(stream, output.num_cached_tokens)
        delta = OutputDelta(
            text=detokenizer.take_text(final=reason is not None),
            token_ids=() if request.is_prewarm else (output.token_id,),
            logprobs=logprobs,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            cached_by_tier=request.cached_by_tier,
            num_output_tokens=output.num_output_tokens,
            recomputed=stream.recomputed,
            num_reasoning_tokens=0 if stream.thinking is None else stream.thinking.num_tokens,
            finish_reason=None if reason is None else reason.value,
            stats=stats,
            stop_string=detokenizer.stopped_by,
            misses=request.misses if output.num_output_tokens <= 1 else (),
            hint=stream.hint,
            comparison=stream.comparison,
            num_guessed_tokens=request.num_guessed_tokens,
            num_accepted_tokens=request.num_accepted_tokens,
        )
        return delta if reason is None else self._ended(stream, delta)

    def _ended(self, stream: Stream, delta: OutputDelta) -> OutputDelta:
        """The last delta, with what is told at the end. Remembers the context, for others to be compared with it."""
        request = stream.request
        answer = self._read_answer(stream)
        if not request.is_prewarm:
            calls = delta.finish_reason == "stop" and answer is not None and bool(answer.calls)
            self.num_finished["tool_calls" if calls else str(delta.finish_reason)] += 1
        transcript = self._remember(stream, answer)
        token_ids = stream.prompt.token_ids if transcript is None else transcript.token_ids
        keys = () if stream.chat is None else (stream.chat.tools_key, stream.chat.system_key)
        self.recent.add(request.request_id, RecentContext(request.tenant, token_ids, *keys))
        return replace(
            delta,
            transcript=transcript,
            retention=None if request.retention_outcome is None else with_unix_time(request.retention_outcome),
            num_lost_marks=stream.num_lost_marks,
        )

    def _explain(self, stream: Stream, num_cached_tokens: int) -> None:
        """With the first token: why which tokens of the prompt were computed, if it is compared with another one."""
        if stream.comparison is not None and not stream.is_explained:
            stream.is_explained = True
            size = self._core.cache_config.chunk_size
            misses = stream.request.misses
            stream.comparison = stream.comparison.with_losses(num_cached_tokens, misses, time.monotonic(), size)

    def _logprobs(self, output: RequestOutput, detokenizer: Detokenizer) -> tuple[TokenLogprob, ...]:
        if output.logprobs is None:
            return ()
        top = tuple(token_logprob(self._tokenizer, token_id, value) for token_id, value in output.logprobs.top)
        chosen = token_logprob(self._tokenizer, output.token_id, output.logprobs.chosen)
        return (chosen._replace(text_offset=detokenizer.text_offset(output.token_id), top=top),)

    @staticmethod
    def _read_answer(stream: Stream) -> ParsedAnswer | None:
        """What the answer of a chat says, if that is of use: for its conversation, or to see whether it calls tools."""
        request = stream.request
        is_needed = stream.may_call or request.conversation_id != request.request_id
        if stream.chat is None or request.is_prewarm or not is_needed:
            return None
        return stream.read_answer(stream.detokenizer.text)

    def _remember(self, stream: Stream, answer: ParsedAnswer | None) -> Transcript | None:
        """Keep the turn's tokens with their text, for when the client sends its history again.

        answer: what its text says, if it is one of a chat.

        None if the request belongs to no conversation, or its prompt has no text.
        """
        request, prompt = stream.request, stream.prompt
        if request.conversation_id == request.request_id:
            return None
        size = self._core.cache_config.chunk_size
        keys = b"".join(request.chunk_keys[: len(prompt.token_ids) // size])
        names = ChunkNames(request.tenant, keys, request.adapter)
        prompt = replace(prompt, names=names)
        output_ids = self._kept_output_ids(stream)
        if not prompt.text:  # a prompt of token ids: nothing to compare texts with
            self._conversations.record_turn(request.conversation_id, prompt, output_ids, "")
            self.note_end(request, "")
            return None
        text = self._tokenizer.token_bytes.text(output_ids)
        turn, tool = None, ""
        if stream.chat is not None and answer is not None:
            num_tokens = request.num_prompt_tokens + len(output_ids)
            turn = stream.chat.answered(answer, num_tokens)
            tool = answer.calls[0].name if answer.calls else ""
        self.note_end(request, tool)
        return self._conversations.record_turn(request.conversation_id, prompt, output_ids, text, turn)

    def _kept_output_ids(self, stream: Stream) -> list[int]:
        """The generated tokens that the answer consists of, as far as whole tokens go.

        Left out are those of its stop string, and of a character that it does not complete. The special token that ends it is
        kept, because the template writes it, too.
        """
        output_ids = stream.request.token_ids[stream.request.num_prompt_tokens :]
        end_ids = output_ids[stream.detokenizer.num_tokens :]
        kept = output_ids[: stream.detokenizer.num_whole_tokens()]
        return kept + [token_id for token_id in end_ids if self._tokenizer.is_special(token_id)]

    @staticmethod
    def _send(items: Sequence[tuple[Stream, Item]]) -> None:
        """One wake-up per event loop, however many requests got something."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = {}
        for stream, item in items:
            by_loop.setdefault(stream.loop, []).append((stream, item))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # that loop is closed, so no consumer is left there
                logger.debug("an event loop closed before its requests ended")


def _put_all(batch: Sequence[tuple[Stream, Item]]) -> None:
    for stream, item in batch:
        stream.items.put_nowait(item)
