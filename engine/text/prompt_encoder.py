"""From a prompt to the token ids to compute, with those ids that its conversation knows.

Short prompts are encoded in the caller's event loop, long ones in a thread of the pool.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from engine.core.retention import RetentionHint
from engine.dialogue.formats import AnswerFormat
from engine.dialogue.messages import Message
from engine.errors import ContextLengthError, InvalidParameterError
from engine.tenant import Tenant
from engine.text.cache_marks import NO_WISH, CacheWish, find_marks, find_places, has_marks, hint_of
from engine.text.comparisons import CacheComparison, RecentContext, compare
from engine.text.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_pool import TokenizerPool
from engine.text.transcript import NO_MATCH, ConversationTable, SameAnswer, Transcript
from engine.text.turns import RecognisedChat

# Characters that are tokenised in the event loop itself, about a millisecond's worth.
MAX_INLINE_CHARS = 4096
MAX_INLINE_TOKENS = 1024  # the same for spelling tokens
INLINE_CHARS_PER_TOKEN = MAX_INLINE_CHARS // MAX_INLINE_TOKENS


class EncodedPrompt(NamedTuple):
    """A prompt as the engine computes it.

    is_known: some ids come from earlier turns, and not from tokenising.
    answer_format: how the answer is to be read, in a chat.
    chat: the messages as they were recognised, in a chat.
    recomputed: (reason, tokens) of what the conversation had of it and has to be computed again, if that is anything.
    retention: what is to become of its KV, if anything is said of that. num_lost_marks: marks in messages whose place the
        prompt does not show.
    """

    transcript: Transcript
    is_known: bool
    answer_format: AnswerFormat | None = None
    chat: RecognisedChat | None = None
    recomputed: tuple[str, int] | None = None
    retention: RetentionHint | None = None
    num_lost_marks: int = 0


class PromptEncoder:
    """Encodes the prompts of one engine. Call it from any event loop."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        conversations: ConversationTable,
        *,
        max_model_len: int,
        vocab_size: int,
        max_num_waiting: int,
        restores_reasoning: bool = True,
    ) -> None:
        """Starts nothing yet.

        conversations: what they have said here so far.
        max_model_len: the window in tokens.
        max_num_waiting: how many long prompts may wait to be tokenised.
        restores_reasoning: what the model thought is put back into messages of a conversation that come without it.
        """
        self._shows_reasoning = bool(tokenizer.chat.traits.reasoning_keys)
        self._restores_reasoning = restores_reasoning and self._shows_reasoning
        self._tokenizer = tokenizer
        self._conversations = conversations
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._pool = TokenizerPool(max_num_waiting)

    async def encode(
        self,
        prompt: Prompt,
        *,
        tenant: Tenant,
        conversation_id: str | None,
        history: Transcript | None,
        room: int,
        wish: CacheWish = NO_WISH,
    ) -> EncodedPrompt:
        """The prompt as token ids, in a thread if it is long.

        conversation_id: whose earlier turns are looked up; None = none.
        history: what the conversation has said, for an engine that has not heard it.
        room: how many tokens a prompt is to have that can be shortened.
        wish: what is to be kept of it.

        Raises ContextLengthError if it does not fit the window, before anything is tokenised if that is clear;
        InvalidParameterError; OverloadedError if too many long prompts wait.
        """
        if isinstance(prompt, TokenPrompt):
            return self._take_token_ids(prompt)._replace(retention=hint_of(wish))
        encode = partial(self._encode_any, prompt, conversation_id, history, room, wish)
        if prompt.num_chars > MAX_INLINE_CHARS:  # it takes long, and meanwhile the loop has others to serve
            return await self._pool.run(encode, tenant, prompt.num_chars)
        return encode()

    def take_prompt(self, prompt: Prompt, transcript: Transcript, wish: CacheWish = NO_WISH) -> EncodedPrompt:
        """A prompt whose token ids are known as a whole. Raises ContextLengthError, InvalidParameterError."""
        encoded = self._take_token_ids(TokenPrompt(tuple(transcript.token_ids)))
        encoded = encoded._replace(transcript=transcript, is_known=True)
        if not isinstance(prompt, ChatPrompt):
            return encoded._replace(retention=hint_of(wish))
        chat = RecognisedChat.of(prompt.messages, prompt.tools, None, restores=False)
        answer_format = self._tokenizer.chat.answer_format(transcript.text)
        return self._with_retention(encoded._replace(answer_format=answer_format, chat=chat), prompt, wish)

    async def compare(
        self, context: RecentContext, encoded: EncodedPrompt, prompt: Prompt, tenant: Tenant
    ) -> CacheComparison:
        """A prompt with an earlier context, in a thread if it is long. Raises OverloadedError if too many prompts wait."""
        transcript, chat = encoded.transcript, encoded.chat

        def find_message(token: int) -> int | None:
            assert isinstance(prompt, ChatPrompt)
            assert chat is not None
            places = [(index, 0) for index in range(len(chat.messages))]
            starts = find_places(chat.messages, places, transcript.text, self._renderer(prompt))
            at = self._tokenizer.count_chars(transcript, token)
            passed = [index for index, start in enumerate(starts) if start is not None and start <= at]
            return passed[-1] if passed else 0

        work = partial(compare, context, transcript, chat, self._tokenizer.decode, find_message)
        if len(transcript.text) > MAX_INLINE_CHARS:
            return await self._pool.run(work, tenant, len(transcript.text))
        return work()

    def _renderer(self, prompt: ChatPrompt) -> Callable[[Sequence[Message]], str]:
        """Renders the prompt with other messages."""
        return lambda messages: self._tokenizer.render_chat(replace(prompt.dialogue, messages=tuple(messages)))

    async def spell(self, token_ids: Sequence[int], tenant: Tenant) -> tuple[str, tuple[str, ...]]:
        """The text of tokens and the name of each, in a thread if they are many. Raises OverloadedError."""

        def spell() -> tuple[str, tuple[str, ...]]:
            return self._tokenizer.decode(token_ids), self._tokenizer.token_names(token_ids)

        if len(token_ids) > MAX_INLINE_TOKENS:
            return await self._pool.run(spell, tenant, len(token_ids) * INLINE_CHARS_PER_TOKEN)
        return spell()

    def check_vocabulary(self, token_ids: Sequence[int], param: str) -> None:
        """Raise InvalidParameterError, about the parameter `param`, for an id that the model does not know."""
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidParameterError(
                    f"token id {token_id} is outside the vocabulary (0 to {self._vocab_size - 1})", param=param
                )

    def shutdown(self) -> None:
        """End what waits with EngineStoppedError; blocks until the work that runs is done."""
        self._pool.shutdown()

    def _take_token_ids(self, prompt: TokenPrompt) -> EncodedPrompt:
        if len(prompt.token_ids) > self._max_model_len:
            raise ContextLengthError(
                f"the context window is {self._max_model_len} tokens, but the prompt has {len(prompt.token_ids)}; shorten it"
            )
        self.check_vocabulary(prompt.token_ids, "prompt")
        return EncodedPrompt(Transcript(array("I", prompt.token_ids), ""), is_known=False)

    def _encode_any(
        self,
        prompt: ChatPrompt | TextPrompt,
        conversation_id: str | None,
        history: Transcript | None,
        room: int,
        wish: CacheWish = NO_WISH,
    ) -> EncodedPrompt:
        """As `encode`. Any thread may call it."""
        if isinstance(prompt, TextPrompt):
            is_bare = not prompt.adds_special_tokens
            encoded = self._encode(prompt.text, conversation_id, history, self._max_model_len, is_bare=is_bare)
            return encoded._replace(retention=hint_of(wish))
        conversation = None if conversation_id is None else self._conversations.find(conversation_id)
        turns = None if conversation is None else conversation.turns
        chat = RecognisedChat.of(prompt.messages, prompt.tools, turns, restores=self._restores_reasoning)
        is_restored = chat.messages != prompt.messages
        try:
            restored = replace(prompt, messages=chat.messages)
            encoded, shown = self._fit_chat(restored, conversation_id, history, room)
        except ContextLengthError:
            if not is_restored:
                raise
            restored = prompt
            encoded, shown = self._fit_chat(prompt, conversation_id, history, room)
        chat = replace(chat, is_truncated=shown is not restored, is_bare=chat.is_bare and self._shows_reasoning)
        recomputed = None
        if conversation is not None:
            transcript = encoded.transcript
            num_same, num_known = conversation.count_same(transcript.token_ids, transcript.fingerprint)
            recomputed = chat.why_again(num_same, num_known, transcript.text)
        is_known = encoded.is_known or is_restored
        return self._with_retention(encoded._replace(is_known=is_known, chat=chat, recomputed=recomputed), shown, wish)

    def _with_retention(self, encoded: EncodedPrompt, prompt: ChatPrompt, wish: CacheWish) -> EncodedPrompt:
        """With what is to become of its KV. Renders the prompt once more if there are marks in the messages."""
        if not has_marks(prompt.messages):
            return encoded._replace(retention=hint_of(wish))
        transcript = encoded.transcript
        marks, num_lost = find_marks(prompt.messages, transcript.text, self._renderer(prompt), wish.mark_ttl_s)
        retention = hint_of(wish, marks, self._tokenizer.count_tokens(transcript))
        return encoded._replace(retention=retention, num_lost_marks=num_lost)

    def _fit_chat(
        self, prompt: ChatPrompt, conversation_id: str | None, history: Transcript | None, room: int
    ) -> tuple[EncodedPrompt, ChatPrompt]:
        """The prompt as token ids, and with the messages that they show: the oldest may be left out."""
        if not prompt.drops_oldest:
            return self._encode_chat(prompt, conversation_id, history, self._max_model_len), prompt
        try:
            return self._encode_chat(prompt, conversation_id, history, room), prompt
        except ContextLengthError:
            shorter = prompt.shorter()
        fitting, low, high = None, 0, len(shorter)  # the longest one that fits is among these
        while low < high:
            middle = (low + high) // 2
            try:
                encoded = self._encode_chat(shorter[middle], conversation_id, history, room)
                fitting, high = (encoded, shorter[middle]), middle
            except ContextLengthError:
                low = middle + 1
        last = (prompt, *shorter)[-1]
        return fitting or (self._encode_chat(last, conversation_id, history, self._max_model_len), last)

    def _encode_chat(
        self, prompt: ChatPrompt, conversation_id: str | None, history: Transcript | None, max_tokens: int
    ) -> EncodedPrompt:
        if len(prompt.messages) > max_tokens:  # each has a token at least
            raise ContextLengthError(
                f"the context window is {max_tokens} tokens, but the prompt has {len(prompt.messages)} messages; "
                "remove some"
            )
        text = self._tokenizer.render_chat(prompt.dialogue)
        is_same = partial(self._tokenizer.chat.is_same_answer, prompt.tools)
        return self._encode(text, conversation_id, history, max_tokens, is_same)

    def _encode(
        self,
        text: str,
        conversation_id: str | None,
        history: Transcript | None,
        max_tokens: int,
        is_same: SameAnswer | None = None,
        *,
        is_bare: bool = False,
    ) -> EncodedPrompt:
        """As `encode`, from the text.

        is_same: in a chat, see Transcript.match_answer.
        is_bare: no special tokens are put around a text that is no chat.
        """
        tokenizer, known, is_chat = self._tokenizer, NO_MATCH, is_same is not None
        fingerprint = tokenizer.fingerprint if is_chat else tokenizer.text_fingerprint
        if conversation_id is not None:
            known = self._conversations.match_text(conversation_id, text, fingerprint, is_same)
        if history is not None and fingerprint and history.fingerprint == fingerprint:
            by_history = history.match(text, tuple(tokenizer.cut_tokens.values()), is_same)
            if by_history.num_chars > known.num_chars and max(by_history.token_ids) < self._vocab_size:
                known = by_history
        transcript = tokenizer.encode_prompt(text, known, is_chat=is_chat or is_bare, max_tokens=max_tokens)
        answer_format = tokenizer.chat.answer_format(text) if is_chat else None
        return EncodedPrompt(transcript, known.num_chars > 0, answer_format)
