"""Token ids of spans: equal spans are equal tokens."""

from __future__ import annotations

from functools import partial

from engine.workloads.session import Span, Turn
from engine.workloads.tokens import WORDS, TokenContext, random_tokens, random_words, repeated_tokens

draw = partial(random_tokens, vocab_size=50, first_id=8)


def test_a_span_is_a_slice_of_its_stream() -> None:
    stream = draw(Span(3, 2000))
    assert draw(Span(3, 700, 1100)) == stream[1100:1800]
    assert draw(Span(3, 512, 512)) == stream[512:1024]
    assert draw(Span(3, 0, 600)) == []
    assert set(stream) == set(range(8, 50))


def test_streams_and_seeds_differ() -> None:
    assert len({tuple(draw(Span(stream, 40), seed=seed)) for stream in range(3) for seed in range(3)}) == 9


def test_simulated_tokens_are_the_number_of_the_stream() -> None:
    assert repeated_tokens(Span(7, 3, 90)) == [7, 7, 7]


def test_words_are_as_many_as_tokens_and_the_same_for_equal_spans() -> None:
    text = random_words(Span(3, 600, 100))
    assert len(text.split()) == 600
    assert random_words(Span(3, 700)).split()[100:] == text.split()
    assert set(text.split()) <= set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


def test_a_context_grows_with_turns_and_answers() -> None:
    context = TokenContext(repeated_tokens)
    assert context.ask(Turn((Span(1, 2), Span(2, 1)), 2)) == [1, 1, 2]
    context.add_answer([9, 9])
    assert context.ask(Turn((Span(2, 1, 1),), 1)) == [1, 1, 2, 9, 9, 2]
    context.add_answer([9])
    assert context.ask(Turn((Span(3, 2),), 1, keep_tokens=2)) == [1, 1, 3, 3]
