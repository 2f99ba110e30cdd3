"""The text of an answer, made from its tokens as they come. Keeps nothing of the prompt but its last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens of the prompt that incremental decoding starts from: enough for any rule about leading spaces.
DECODE_CONTEXT_LEN = 8


class Detokenizer:
    """The text of one answer as its tokens come, and the end of it where a stop string appears."""

    def __init__(self, backend: Any, prompt_token_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._backend = backend
        # The last tokens whose text is known, `_num_known` of them, then those that may be part of a character.
        self._token_ids = list(prompt_token_ids[-DECODE_CONTEXT_LEN:])
        self._num_known = len(self._token_ids)
        self._stop = tuple(stop)
        self._num_emitted = 0
        self.text = ""
        self.is_stopped = False

    def append(self, token_id: int, *, may_stop: bool = True) -> None:
        """Take in a token. Sets `is_stopped`, and cuts `text` before the stop string, where one is complete."""
        piece = self._decode_next(token_id)
        if not piece:
            return
        num_before = len(self.text)
        self.text += piece
        if may_stop:
            # It has to end in the new text: one that was complete while it might not stop is text like any other.
            places = [self.text.find(stop, max(0, num_before - len(stop) + 1)) for stop in self._stop]
            found = [place for place in places if place >= 0]
            if found:
                self.text = self.text[: min(found)]
                self.is_stopped = True

    def resume(self, token_ids: Sequence[int], num_taken_chars: int) -> None:
        """Take in the beginning of an answer that did not stop, of which the first characters are known to whoever asked."""
        for token_id in token_ids:
            self.append(token_id, may_stop=False)
        self._num_emitted = num_taken_chars

    def _decode_next(self, token_id: int) -> str:
        """Text that this token completes. (tokenizers' own DecodeStream raises on byte-fallback tokens that are no UTF-8, and
        repeats the prompt where that ends in half a character.)"""
        self._token_ids.append(token_id)
        known = self._backend.decode(self._token_ids[: self._num_known], skip_special_tokens=True)
        text: str = self._backend.decode(self._token_ids, skip_special_tokens=True)
        if len(text) <= len(known) or text.endswith("\ufffd"):
            return ""
        del self._token_ids[: self._num_known]
        self._num_known = len(self._token_ids)
        return text[len(known) :]

    def take_text(self, *, final: bool) -> str:
        """Text that was not taken yet. Unless `final`, an end that could begin a stop string is held back."""
        end = len(self.text)
        if not final:
            end -= self._num_held_back()
        start, self._num_emitted = self._num_emitted, max(self._num_emitted, end)
        return self.text[start:end]

    def _num_held_back(self) -> int:
        longest = min(max(map(len, self._stop), default=1) - 1, len(self.text))
        for length in range(longest, 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
