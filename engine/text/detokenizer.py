"""From tokens to text: the text of an answer as its tokens come, and its end at a stop string.

Tokens are taken as bytes and joined before they are read as UTF-8, so what a token costs depends neither on the tokens
before it nor on what they are: no list of tokens is ever decoded again. Knows no prompt and no conversation.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# Stands on both sides of a token whose text is asked for; every decoder leaves a plain letter as it is.
NEIGHBOUR = "x"
REPLACEMENT = "\ufffd"
BYTE_FALLBACK_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level tokenizers, GPT-2's: the byte that each character stands for.

    Printable bytes stand for themselves, the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


class TokenBytes(dict[int, bytes]):
    """The bytes that each token id adds to a text, computed when first asked for.

    Ids beyond the vocabulary have none, and a special token counts as its content. The tokenizer's own decoder says which
    bytes a token stands for: it is asked for the token between two letters. Only a token that is part of a character is
    looked at itself.
    """

    def __init__(self, backend: Any) -> None:
        """`backend`: a tokenizers.Tokenizer."""
        super().__init__()
        self._backend = backend
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self._join = " ".join if backend.decoder is None else backend.decoder.decode
        self._after = self._join([NEIGHBOUR, NEIGHBOUR]).removeprefix(NEIGHBOUR)

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        self[token_id] = value = b"" if token is None else self._bytes_of(token_id, token)
        return value

    def _bytes_of(self, token_id: int, token: str) -> bytes:
        text: str = self._join([NEIGHBOUR, token, NEIGHBOUR]).removeprefix(NEIGHBOUR).removesuffix(self._after)
        if REPLACEMENT not in text:
            return text.encode()
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        if match := BYTE_FALLBACK_TOKEN.fullmatch(token):
            return bytes.fromhex(match[1])
        if all(char in BYTE_OF_CHAR for char in token):
            return bytes(BYTE_OF_CHAR[char] for char in token)
        return text.encode()  # the character U+FFFD itself

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special ones included; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self[token_id] for token_id in token_ids).decode(errors="replace")


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces.

    The automaton of Aho and Corasick (1975): a state is the longest end of the text that begins one of the strings. A
    character costs amortised O(1), however many and long the strings are; building it costs their total length.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """`strings`: not empty ones."""
        self._next: list[dict[str, int]] = [{}]
        self._match = [""]  # the longest string that ends in this state
        for string in strings:
            state = 0
            for char in string:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self._match.append("")
                state = self._next[state][char]
            self._match[state] = string
        self._shorter = [0] * len(self._next)  # the state of the longest shorter end
        self._num_open = [0] * len(self._next)  # length of the longest end that could go on to a string
        self._state = 0
        row, depth = [0], 0
        while row:
            depth += 1
            row = [self._link(state, char, child, depth) for state in row for char, child in self._next[state].items()]

    def _link(self, state: int, char: str, child: int, depth: int) -> int:
        shorter = self._step(self._shorter[state], char) if state else 0
        self._shorter[child] = shorter
        self._match[child] = self._match[child] or self._match[shorter]
        self._num_open[child] = depth if self._next[child] else self._num_open[shorter]
        return child

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(char, 0)

    @property
    def num_open(self) -> int:
        """How many characters at the end of the text could be the beginning of a string."""
        return self._num_open[self._state]

    def find(self, piece: str) -> tuple[int, str] | None:
        """Go on with `piece`, up to the first string that ends in it.

        Returns where that string starts, counted from the beginning of `piece` (it may be negative), and the string. Of
        several that end in the same place, the longest. None: `piece` was read to its end.
        """
        for index, char in enumerate(piece, start=1):
            self._state = self._step(self._state, char)
            if string := self._match[self._state]:
                return index - len(string), string
        return None

    def pass_over(self, piece: str) -> None:
        """Go on with `piece`, in which a string that ends is text like any other."""
        for char in piece:
            self._state = self._step(self._state, char)


def _begins_a_character(data: bytes) -> bool:
    """Whether up to four bytes are the beginning of a character in UTF-8, or all of it."""
    if len(data) == 2 and data[0] == 0xED and data[1] >= 0xA0:
        return False  # half a surrogate pair: Python waits for the third byte before it says so
    try:
        codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


class Detokenizer:
    """The text of one answer as its tokens come, which ends at a stop string.

    A character is text once all its bytes are there; bytes that cannot become one are U+FFFD at once. Special tokens are
    no text. num_chars: length of `text`. stopped_by: the stop string that is complete; `text` ends before it, and no more
    tokens may come. None = none is.
    """

    def __init__(
        self,
        token_bytes: Mapping[int, bytes],
        special_ids: Collection[int],
        stop: Sequence[str],
        *,
        keeps_stop: bool = False,
    ) -> None:
        """keeps_stop: the text ends behind the stop string and not before it."""
        self._token_bytes = token_bytes
        self._special_ids = special_ids
        self._stop = StopStrings(stop) if stop else None
        self._keeps_stop = keeps_stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._taken: list[str] = []
        self._untaken = ""
        # How much text there was after each token; None if that ended in a part of a character.
        self._num_chars_after: list[int | None] = []
        self.num_chars = 0
        self.stopped_by: str | None = None

    @property
    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    @property
    def text(self) -> str:
        return "".join((*self._taken, self._untaken))

    @property
    def num_tokens(self) -> int:
        return len(self._num_chars_after)

    @property
    def _begun_char(self) -> bytes:
        """The first bytes, up to three, of a character whose others are still to come."""
        return self._utf8.getstate()[0]

    def _decode(self, token_bytes: bytes) -> str:
        piece = self._utf8.decode(token_bytes)
        if not _begins_a_character(self._begun_char):
            piece += self._utf8.decode(b"", final=True)
        return piece

    def append(self, token_id: int, *, may_stop: bool = True) -> None:
        """Take in a token. Sets `stopped_by`, and cuts `text` before the stop string, if one is complete."""
        piece = "" if token_id in self._special_ids else self._decode(self._token_bytes[token_id])
        num_chars_before = self.num_chars
        self._untaken += piece
        self.num_chars += len(piece)
        self._num_chars_after.append(None if self._begun_char else self.num_chars)
        if self._stop is None:
            return
        if not may_stop:
            # Such a string can still be the beginning of one that is complete later, when it may.
            self._stop.pass_over(piece)
        elif found := self._stop.find(piece):
            start, self.stopped_by = found
            end = start + len(self.stopped_by) if self._keeps_stop else start
            num_cut_chars = self.num_chars - (num_chars_before + end)
            self._untaken = self._untaken[: max(0, len(self._untaken) - num_cut_chars)]
            self.num_chars -= num_cut_chars

    def text_offset(self, token_id: int) -> int:
        """Characters of the answer before the one that `token_id` would begin in, if it came next."""
        begun_char = self._begun_char
        if not begun_char or token_id in self._special_ids:
            return self.num_chars
        goes_on = _begins_a_character(begun_char + self._token_bytes[token_id][:1])
        return self.num_chars if goes_on else self.num_chars + 1  # behind the U+FFFD that the begun one becomes

    def resume(self, token_ids: Sequence[int], num_taken_chars: int) -> None:
        """Take in the beginning of an answer that did not stop, of which the client has the first characters."""
        for token_id in token_ids:
            self.append(token_id, may_stop=False)
            self.take_text(final=False)
        text = self.text
        self._taken, self._untaken = [text[:num_taken_chars]], text[num_taken_chars:]

    def take_text(self, *, final: bool) -> str:
        """Text that was not taken yet. Unless `final`, an end that could begin a stop string is held back."""
        num_held_back = 0 if final or self._stop is None else self._stop.num_open
        end = max(0, len(self._untaken) - num_held_back)
        text, self._untaken = self._untaken[:end], self._untaken[end:]
        self._taken.append(text)
        return text

    def num_whole_tokens(self) -> int:
        """How many tokens, from the first on, have all their text in `text`.

        The last ones may be part of a character that was never completed, or reach into the stop string.
        """
        num_tokens = len(self._num_chars_after)
        while num_tokens:
            num_chars = self._num_chars_after[num_tokens - 1]
            if num_chars is not None and num_chars <= self.num_chars:
                break
            num_tokens -= 1
        return num_tokens
