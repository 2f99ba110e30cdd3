"""Text to token ids and back, with the model's own tokenizer and chat template.

Says which ids a prompt has; text/transcript.py keeps what a conversation has said.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import Any

from transformers import AutoTokenizer

from engine.dialogue.chat_template import ChatTemplate
from engine.dialogue.messages import Dialogue
from engine.errors import ContextLengthError, ModelLoadError
from engine.grammar.interface import Vocabulary
from engine.text.detokenizer import Detokenizer, TokenBytes
from engine.text.tokenizer_rules import find_cut_tokens, find_token_bound
from engine.text.transcript import Transcript, TranscriptMatch

logger = logging.getLogger(__name__)

# For models without a chat template of their own (GPT-2, OPT): a plain script of the dialogue.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Characters that are tokenised in one go if the text may be cut there.
PIECE_CHARS = 1 << 16


class Tokenizer:
    """A fast tokenizer (the kind that knows where in the text each token lies)."""

    def __init__(self, location: str, *, tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> None:
        """Load a tokenizer and find out what its chat template does.

        location: a folder or a hub id.
        tool_call_parser, reasoning_parser: see ChatTemplate.

        Raises ModelLoadError, and ConfigError for an unknown parser.
        """
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(location)
        except Exception as error:  # a malformed tokenizer.json raises anything, bare Exception included
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ModelLoadError(f"cannot load a tokenizer from {location!r}: {reason}", param="model") from error
        if not self._tokenizer.is_fast:
            raise ModelLoadError(f"the tokenizer of {location!r} has no fast version (tokenizer.json)", param="model")
        self.has_chat_template = self._tokenizer.chat_template is not None
        if not self.has_chat_template:
            logger.warning("%s has no chat template; messages are rendered as 'role: content' lines", location)
            self._tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        self.chat = ChatTemplate(self._tokenizer, tool_call_parser=tool_call_parser, reasoning_parser=reasoning_parser)
        self._backend: Any = self._tokenizer.backend_tokenizer
        identity = json.dumps([self._backend.to_str(), self._tokenizer.chat_template])
        # Equal for two tokenizers that give equal ids for equal messages.
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        rules = json.loads(self._backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._token_bound = find_token_bound(rules)
        # The text of each token before which texts may be cut: tokenising the two sides apart gives the tokens of the whole.
        self.cut_tokens = find_cut_tokens(rules)
        self._cut_pattern = re.compile("|".join(map(re.escape, self.cut_tokens.values())) or "(?!)")
        self._text_prefix, text_suffix = self._find_special_tokens()
        # The same for texts that are no chats. Ids that end with what the tokenizer ends texts with are of no use later.
        self.text_fingerprint = "" if text_suffix else self.fingerprint + "-text" * bool(self._text_prefix)
        self._text_suffix = text_suffix
        self._special_ids = frozenset(self._tokenizer.all_special_ids) | frozenset(
            token_id for token_id, token in self._tokenizer.added_tokens_decoder.items() if token.special
        )
        self.token_bytes = TokenBytes(self._tokenizer.backend_tokenizer)
        # The special tokens in which calls and thinking are written, by their texts.
        self.marker_ids = self._find_markers()

    @property
    def num_added_to_texts(self) -> tuple[int, int]:
        """How many special tokens the tokenizer puts before and behind every text that is no chat."""
        return len(self._text_prefix), len(self._text_suffix)

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def vocabulary(self, num_ids: int, eos_token_ids: Collection[int]) -> Vocabulary:
        """What the tokens of a model say that can choose among `num_ids`; ids that this tokenizer lacks say nothing."""
        return Vocabulary(
            tuple(self.token_bytes[token_id] for token_id in range(num_ids)),
            frozenset(token_id for token_id in self._special_ids if token_id < num_ids),
            tuple(sorted(token_id for token_id in eos_token_ids if token_id < num_ids)),
        )

    def encode_marker(self, text: str) -> tuple[int, ...]:
        """The token ids of a text that stands anywhere."""
        return tuple(self._encode(text).ids)

    def render_chat(self, chat: Dialogue | Sequence[tuple[str, str]]) -> str:
        """The text of a chat, up to where the assistant is to answer.

        chat: (role, content) messages, or messages with all that belongs to them.

        Raises InvalidParameterError if the model's template rejects them, or fails with them.
        """
        return self.chat.render(chat if isinstance(chat, Dialogue) else Dialogue.of(chat))

    def encode_prompt(self, text: str, known: TranscriptMatch, *, is_chat: bool, max_tokens: int) -> Transcript:
        """The token ids of `text`, of which the beginning is `known`; only the rest is tokenised.

        Safe in any thread.

        is_chat: the template has put the tokens into the text with which the tokenizer begins (and ends) other texts.
        max_tokens: the window.

        Raises ContextLengthError if there are more than `max_tokens`, as soon as that is known: before anything is
        tokenised if the text is too long for any row of that many tokens.
        """
        token_ids = known.token_ids[:]
        if not known.num_chars and not is_chat:
            token_ids.extend(self._text_prefix)
        anchors, start = list(known.anchors), known.num_chars
        if self._token_bound is not None:
            _check_length(len(token_ids) + self._token_bound.min_tokens(text[start:]), max_tokens, is_exact=False)
        while start < len(text):
            # Each piece is tokenised as it would be in the whole text; other threads run between two pieces of a long one.
            cut = self._cut_pattern.search(text, start + PIECE_CHARS)
            end = len(text) if cut is None else cut.start()
            piece = self._encode(text[start:end])
            _check_length(len(token_ids) + len(piece), max_tokens, is_exact=end == len(text))
            piece_ids = piece.ids
            for index, token_id in enumerate(piece_ids):
                if token_id in self.cut_tokens:
                    place = start + piece.token_to_chars(index)[0]
                    if place and text.startswith(self.cut_tokens[token_id], place):
                        anchors.append((len(token_ids) + index, place))
            token_ids.extend(piece_ids)
            start = end
        if not is_chat:
            token_ids.extend(self._text_suffix)
        fingerprint = self.fingerprint if is_chat else self.text_fingerprint
        return Transcript(token_ids, text, tuple(anchors), fingerprint)

    def count_tokens(self, transcript: Transcript) -> Callable[[int], int]:
        """Tells how many tokens are in front of a character of the text, to be asked in ascending order.

        A token's difference is possible where a text is cut that the tokenizer cuts elsewhere. All answers together take no
        longer than tokenising the text.
        """
        anchors, known = transcript.anchors, (0, 0)

        def count(num_chars: int) -> int:
            nonlocal known
            if num_chars >= len(transcript.text):
                return len(transcript.token_ids)
            index = bisect_right(anchors, num_chars, key=lambda anchor: anchor[1])
            num_tokens, start = max(known, anchors[index - 1] if index else (0, 0), key=lambda place: place[1])
            num_tokens += len(self._encode(transcript.text[start:num_chars])) if start < num_chars else 0
            known = (min(num_tokens, len(transcript.token_ids)), num_chars)
            return known[0]

        return count

    def count_chars(self, transcript: Transcript, num_tokens: int) -> int:
        """About how many characters the first tokens stand for; decodes no more than what follows the last cut."""
        anchors = transcript.anchors
        index = bisect_right(anchors, num_tokens, key=lambda anchor: anchor[0])
        start_tokens, start = anchors[index - 1] if index else (0, 0)
        return min(start + len(self.decode(transcript.token_ids[start_tokens:num_tokens])), len(transcript.text))

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> Any:
        """As tokenizers.Encoding. In a batch of one: alone, it would keep Python's other threads waiting."""
        return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def _find_special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer begins and ends every text with that is no chat."""
        whole = self._encode("x", add_special_tokens=True)
        start = len(list(takewhile(bool, whole.special_tokens_mask)))
        return whole.ids[:start], whole.ids[start + len(self._encode("x")) :]

    def _find_markers(self) -> dict[str, int]:
        """Ids by text of the special tokens that are markers of calls and thinking, or parts of one."""
        markers = self.chat.markers
        texts = {
            self.token_bytes[token_id].decode(errors="replace"): token_id for token_id in sorted(self._special_ids)
        }
        return {
            text: token_id
            for text, token_id in texts.items()
            if text and (markers is None or any(text in marker for marker in markers))
        }

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special ones included."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def token_names(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """What the tokenizer calls these tokens; empty for an id that it does not have."""
        return tuple(name or "" for name in self._tokenizer.convert_ids_to_tokens(list(token_ids)))

    def detokenizer(
        self,
        stop: Sequence[str],
        *,
        keeps_markers: bool = False,
        keeps_special: bool = False,
        keeps_stop: bool = False,
    ) -> Detokenizer:
        """A detokenizer of one answer.

        keeps_markers: special tokens that mean something to the parser of answers are text; keeps_special: all are.
        keeps_stop: so is the stop string that ends it.
        """
        hidden_ids = frozenset[int]() if keeps_special else self._special_ids
        if keeps_markers:
            hidden_ids = hidden_ids.difference(self.marker_ids.values())
        return Detokenizer(self.token_bytes, hidden_ids, stop, keeps_stop=keeps_stop)


def _check_length(num_tokens: int, max_tokens: int, *, is_exact: bool) -> None:
    """Raises ContextLengthError for a prompt of `num_tokens`, or of at least so many."""
    if num_tokens > max_tokens:
        raise ContextLengthError(
            f"the context window is {max_tokens} tokens, but the prompt has {'' if is_exact else 'at least '}{num_tokens}; "
            "shorten it"
        )
