"""The seam between the engine and whatever knows grammars. Knows no library, no model and no request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.core.grammar import GrammarSpec


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each number in a model's logits stands for.

    token_bytes: of each id, what it adds to a text; a token that adds nothing is never allowed.
    special_ids: never allowed within a text, except one that a grammar begins behind.
    eos_ids: those that end an answer.
    """

    token_bytes: Sequence[bytes]
    special_ids: frozenset[int]
    eos_ids: tuple[int, ...]


class Matcher(Protocol):
    """How far one answer has come in its grammar. Used by one thread at a time.

    error: why it cannot go on, now or later; None = it can.
    """

    @property
    def error(self) -> str | None: ...

    def fill(self, mask: np.ndarray) -> None:
        """Write which tokens may come next; all of them if there is an error, so that there is something to draw from.

        mask: uint8, contiguous; 8 tokens a byte, the lowest bit first, and as many bytes as make whole words of 32 bits.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Go on with the token that was chosen. After an end token nothing happens any more."""
        ...

    def copy(self) -> Matcher:
        """Another one that has come as far."""
        ...


class MatcherBehind:
    """One behind a guessed token; those of a row of guesses share a copy, and are filled once, in their order.

    error: of an answer that goes on with the guess; behind one that is not allowed, it means nothing.
    """

    def __init__(self, ahead: Matcher, guess: int) -> None:
        """ahead: stands before the guess when this one is filled."""
        self._ahead, self._guess = ahead, guess
        self.error: str | None = None

    def fill(self, mask: np.ndarray) -> None:
        """See Matcher."""
        self._ahead.accept(self._guess)
        self._ahead.fill(mask)
        self.error = self._ahead.error

    def accept(self, token_id: int) -> None:
        """Nothing goes on from here."""

    def copy(self) -> MatcherBehind:
        """See Matcher."""
        return MatcherBehind(self._ahead.copy(), self._guess)


class BrokenMatcher:
    """One that has an error from the start."""

    def __init__(self, error: str) -> None:
        self.error: str | None = error

    def fill(self, mask: np.ndarray) -> None:
        """See Matcher."""
        mask[:] = 0xFF

    def accept(self, token_id: int) -> None:
        """See Matcher."""

    def copy(self) -> BrokenMatcher:
        """See Matcher."""
        return self


class CompiledGrammar(Protocol):
    """A grammar that can be followed. Thread-safe."""

    def matcher(self) -> Matcher:
        """One at the beginning of an answer."""
        ...


class GrammarCompiler(Protocol):
    """Thread-safe."""

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """What matches the answers of this form.

        Raises InvalidParameterError, with the reason, if the grammar is wrong or too large, if it cannot be enforced fully,
        or if no answer matches it.
        """
        ...

    def close(self) -> None:
        """Give back what it has outside this process. No call follows."""
        ...
