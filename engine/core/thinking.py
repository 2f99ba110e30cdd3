"""Where an answer is thinking, and how much of it may be, as plain data. engine/grammar/thinking.py follows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkingSpan:
    """Which part of an answer is thinking.

    opening: the text with which an answer begins that thinks; empty = it begins within thinking.
    closing: the text that ends it.
    repeats: it may be anywhere in the answer, and more than once.
    """

    opening: str
    closing: str
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class ThinkingLimit:
    """How much of an answer may be thinking.

    max_tokens: after so many tokens of it the end is forced, as soon as a character is whole.
    closing_ids: the tokens of its end.
    """

    span: ThinkingSpan
    max_tokens: int
    closing_ids: tuple[int, ...]
