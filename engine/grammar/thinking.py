"""Follows the thinking in an answer token by token, and ends it when there is enough of it. Knows no library."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from copy import copy
from enum import Enum

import numpy as np

from engine.core.thinking import ThinkingLimit, ThinkingSpan
from engine.grammar.interface import Matcher

BLANK = b" \t\r\n"


class _Place(Enum):
    BEGINNING = "nothing but white space and a part of the opening so far"
    OUTSIDE = "the opening may still come"
    WITHIN = "thinking"
    BEHIND = "no more thinking comes"


class ThinkingScanner:
    """How far an answer's thinking has come.

    It is told by its text, like ReasoningParser: a model may spell a marker in several tokens.

    num_tokens: of thinking so far, those of its end included.
    """

    def __init__(self, span: ThinkingSpan, token_bytes: Mapping[int, bytes]) -> None:
        """token_bytes: what each token adds to a text."""
        self._opening, self._closing = span.opening.encode(), span.closing.encode()
        self._repeats = span.repeats
        self._token_bytes = token_bytes
        self._tail = b""  # the end of the text that matters for what comes
        outside = _Place.OUTSIDE if span.repeats else _Place.BEGINNING
        self._place = outside if span.opening else _Place.WITHIN
        self.num_tokens = 0

    @property
    def is_within(self) -> bool:
        return self._place is _Place.WITHIN

    @property
    def is_whole(self) -> bool:
        """Whether the text so far ends with a whole character."""
        return codecs.utf_8_decode(self._tail, "replace", False)[1] == len(self._tail)

    def accept(self, token_id: int) -> None:
        """Go on with the next token."""
        if self._place is _Place.BEHIND:
            return
        self.num_tokens += self.is_within
        self._tail += self._token_bytes[token_id]
        if self._place is _Place.BEGINNING:
            self._begin()
        while self._place in (_Place.OUTSIDE, _Place.WITHIN):
            marker = self._closing if self.is_within else self._opening
            before, found, behind = self._tail.partition(marker)
            if not found:
                # Of the marker as much as may be there, and of a character.
                self._tail = before[-max(len(marker) - 1, 3) :]
                return
            self._tail = behind
            if not self.is_within:
                self._place = _Place.WITHIN
            else:
                self._place = _Place.OUTSIDE if self._repeats else _Place.BEHIND

    def accept_all(self, token_ids: Iterable[int]) -> None:
        """Go on with several tokens."""
        for token_id in token_ids:
            self.accept(token_id)

    def _begin(self) -> None:
        self._tail = self._tail.lstrip(BLANK)
        if self._tail.startswith(self._opening):
            self._tail = self._tail.removeprefix(self._opening)
            self._place = _Place.WITHIN
        elif not self._opening.startswith(self._tail):
            self._place = _Place.BEHIND


class LimitedThinking:
    """See interface.Matcher. Anything is allowed, or what `inner` allows, until the thinking has to end."""

    def __init__(self, limit: ThinkingLimit, token_bytes: Mapping[int, bytes], inner: Matcher | None) -> None:
        """inner: what else the answer is held to; one at the beginning of an answer. None = nothing."""
        self._limit = limit
        self._scanner = ThinkingScanner(limit.span, token_bytes)
        self._inner = inner
        self._num_closed = 0  # tokens of the end that are there

    @property
    def error(self) -> str | None:
        return None if self._inner is None else self._inner.error

    def fill(self, mask: np.ndarray) -> None:
        """See interface.Matcher."""
        if self._inner is None:
            mask[:] = 0xFF
        else:
            self._inner.fill(mask)
        if self._has_to_end:
            token_id = self._limit.closing_ids[self._num_closed]
            mask[:] = 0
            mask[token_id >> 3] = 1 << (token_id & 7)

    def accept(self, token_id: int) -> None:
        """See interface.Matcher."""
        is_next = self._has_to_end and token_id == self._limit.closing_ids[self._num_closed]
        if self._inner is not None:
            self._inner.accept(token_id)
        self._scanner.accept(token_id)
        self._num_closed = self._num_closed + 1 if is_next and self._scanner.is_within else 0

    def copy(self) -> LimitedThinking:
        """See interface.Matcher."""
        other = copy(self)
        other._scanner = copy(self._scanner)
        other._inner = None if self._inner is None else self._inner.copy()
        return other

    @property
    def _has_to_end(self) -> bool:
        """Whether the next token has to be one of the end."""
        if self._num_closed == len(self._limit.closing_ids):
            return False
        is_used_up = self._scanner.is_within and self._scanner.num_tokens >= self._limit.max_tokens
        return is_used_up and (self._num_closed > 0 or self._scanner.is_whole)
