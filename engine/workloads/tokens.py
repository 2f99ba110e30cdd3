"""The tokens of spans, for those that need some: equal spans give equal ones, different streams different ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from engine.workloads.session import Span, Turn

# How tokens of a stream are drawn: in blocks of so many, so that a span far behind costs no more.
_BLOCK_LEN = 512
# Short and common, so that most tokenizers have each of them, with the space before it, as one token.
# fmt: off
WORDS = (
    "the", "of", "and", "to", "in", "is", "for", "that", "with", "on", "as", "are", "it", "be", "this", "was", "by",
    "at", "from", "have", "or", "an", "not", "can", "will", "all", "more", "has", "been", "one", "their", "which",
    "about", "out", "up", "when", "your", "its", "time", "if", "some", "them", "would", "other", "into", "then", "no",
    "new", "just", "like", "people", "only", "over", "also", "after", "most", "use", "work", "first", "well", "way",
    "even", "want", "because", "any", "these", "give", "day", "us", "make", "world", "school", "still", "try", "last",
    "ask", "need", "too", "feel", "three", "state", "never", "between", "high", "really", "something", "another",
    "much", "family", "own", "leave", "put", "old", "while", "mean", "keep", "student", "why", "let", "great", "same",
    "big", "group", "begin", "seem", "country", "help", "talk", "turn", "problem", "every", "start", "hand", "might",
    "show", "part", "against", "place", "such", "again", "few", "case", "week",
)
# fmt: on


def repeated_tokens(span: Span) -> list[int]:
    """The number of the stream, as often as the span is long: for simulations, in which only equality counts."""
    return [span.stream] * span.num_tokens


def random_tokens(span: Span, vocab_size: int, first_id: int = 0, seed: int = 0) -> list[int]:
    """Ids from `first_id` to below `vocab_size`, at random, the same for equal spans."""
    return list(map(int, _numbers(span, first_id, vocab_size, seed)))


def random_words(span: Span, seed: int = 0) -> str:
    """A text of as many words as the span has tokens, the same for equal spans."""
    return " ".join(WORDS[number] for number in _numbers(span, 0, len(WORDS), seed))


class TokenContext:
    """The token ids of a session's context, turn by turn."""

    def __init__(self, tokens_of: Callable[[Span], list[int]]) -> None:
        self.token_ids: list[int] = []
        self._tokens_of = tokens_of

    def ask(self, turn: Turn) -> list[int]:
        """The prompt of a turn. It is the context itself, which grows with the answer: copy what has to stay."""
        if turn.keep_tokens is not None:
            del self.token_ids[turn.keep_tokens :]
        for span in turn.new:
            self.token_ids += self._tokens_of(span)
        return self.token_ids

    def add_answer(self, token_ids: Iterable[int]) -> None:
        self.token_ids += token_ids


def _numbers(span: Span, low: int, high: int, seed: int) -> np.ndarray:
    first, last = span.start // _BLOCK_LEN, (span.start + span.num_tokens - 1) // _BLOCK_LEN
    blocks = [
        np.random.default_rng((seed, span.stream, block)).integers(low, high, _BLOCK_LEN)
        for block in range(first, last + 1)
    ]
    begin = span.start - first * _BLOCK_LEN
    return np.concatenate(blocks)[begin : begin + span.num_tokens] if blocks else np.empty(0, np.int64)
