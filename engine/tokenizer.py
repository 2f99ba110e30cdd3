"""Text to token ids and back: the model's own tokenizer and chat template. Keeps no conversation; see core/conversation."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from engine.core.conversation import Transcript, TranscriptMatch
from engine.detokenizer import Detokenizer
from engine.errors import InvalidParameterError, ModelLoadError

logger = logging.getLogger(__name__)

# For models without a chat template of their own (GPT-2, OPT): a plain script of the dialogue.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Tokenizer:
    """A fast tokenizer (the kind that knows where in the text each token lies)."""

    def __init__(self, location: str) -> None:
        """`location`: a folder or a hub id. Raises ModelLoadError."""
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(location)
        except Exception as error:  # a malformed tokenizer.json raises anything, bare Exception included
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ModelLoadError(f"cannot load a tokenizer from {location!r}: {reason}", param="model") from error
        if not self._tokenizer.is_fast:
            raise ModelLoadError(f"the tokenizer of {location!r} has no fast version (tokenizer.json)", param="model")
        if self._tokenizer.chat_template is None:
            logger.warning("%s has no chat template; messages are rendered as 'role: content' lines", location)
            self._tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        self.fingerprint = self._fingerprint()
        first_token = self._tokenizer.convert_ids_to_tokens(self._encode("x")[0][:1])
        self._begins_with_space = bool(first_token) and first_token[0].startswith("\u2581")
        self._special_ids = frozenset(self._tokenizer.all_special_ids) | frozenset(
            token_id for token_id, token in self._tokenizer.added_tokens_decoder.items() if token.special
        )

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def render_chat(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text that stands for (role, content) messages, up to where the assistant is to speak. Raises
        InvalidParameterError where the model's template refuses them."""
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidParameterError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return text

    def encode_prompt(self, text: str, known: TranscriptMatch, *, add_special_tokens: bool) -> Transcript:
        """`text`, of which the beginning is `known`; only the rest is tokenised. add_special_tokens: begin with what the
        tokenizer begins texts with; no for chats, whose template does it."""
        if known.num_chars:
            token_ids, starts = self._encode_continuation(text, known.num_chars)
        else:
            token_ids, spans = self._encode(text, add_special_tokens=add_special_tokens)
            starts = [start for start, _ in spans]
        num_known = len(known.token_ids)
        anchors = list(known.anchors)
        if 0 < known.num_chars < len(text):
            anchors.append((num_known, known.num_chars))
        for index, (token_id, start) in enumerate(zip(token_ids, starts, strict=True)):
            if token_id in self._special_ids and index:
                anchors.append((num_known + index, known.num_chars + start))
        return Transcript(known.token_ids + array("I", token_ids), text, tuple(anchors), self.fingerprint)

    def _fingerprint(self) -> str:
        """Equal for two tokenizers that give equal ids for equal messages: all of tokenizer.json, and the chat template."""
        identity = [self._tokenizer.backend_tokenizer.to_str(), self._tokenizer.chat_template]
        return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters [start, end) of each."""
        encoding = self._tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            verbose=False,  # the window is the engine's to check
        )
        return encoding.input_ids, encoding.offset_mapping

    def _encode_continuation(self, text: str, num_known_chars: int) -> tuple[list[int], list[int]]:
        """Token ids of text[num_known_chars:], and where each starts in that. A tokenizer that puts a space before whatever a
        text begins with must not do so in the middle of one: it is given the character before, whose tokens are left out."""
        if self._begins_with_space:
            token_ids, spans = self._encode(text[num_known_chars - 1 :])
            first = next((index for index, (_, end) in enumerate(spans) if end > 1), len(spans))
            if first == len(spans) or spans[first][0] >= 1:  # no token spans both characters
                return token_ids[first:], [start - 1 for start, _ in spans[first:]]
        token_ids, spans = self._encode(text[num_known_chars:])
        return token_ids, [start for start, _ in spans]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special ones included."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def detokenizer(self, prompt_token_ids: Sequence[int], stop: Sequence[str]) -> Detokenizer:
        return Detokenizer(self._tokenizer.backend_tokenizer, prompt_token_ids, stop)
