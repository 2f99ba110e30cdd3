"""Where thinking begins and ends in an answer, token by token, and that a limit ends it."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.thinking import ThinkingLimit, ThinkingSpan
from engine.dialogue.events import parse_answer
from engine.dialogue.reasoning import THINK
from engine.grammar.thinking import LimitedThinking, ThinkingScanner

OPENED = ThinkingSpan("", "</think>")
MAY_OPEN = ThinkingSpan("<think>", "</think>")
ANALYSIS = ThinkingSpan("<think>", "</think>", repeats=True)
# How the text before a token ends if that token is thinking.
WITHIN = {
    OPENED: r"(?!.*</think>).*",
    MAY_OPEN: r"[ \t\r\n]*<think>(?!.*</think>).*",
    ANALYSIS: r"((?!<think>).)*(<think>((?!</think>).)*</think>((?!<think>).)*)*<think>(?!.*</think>).*",
}
PIECES = st.sampled_from(
    ["<think>", "</think>", "<", "think>", "</", "th", "ink", ">", " ", "\n", "a", "<think>a", "日"]
)
END = (100, 101)


def scanned(span: ThinkingSpan, pieces: list[bytes]) -> ThinkingScanner:
    scanner = ThinkingScanner(span, dict(enumerate(pieces)))
    scanner.accept_all(range(len(pieces)))
    return scanner


@pytest.mark.parametrize("span", WITHIN, ids=["opened", "may open", "repeats"])
@given(pieces=st.lists(PIECES, max_size=12))
def test_a_token_is_thinking_by_the_text_before_it(span: ThinkingSpan, pieces: list[str]) -> None:
    texts = ["".join(pieces[:count]) for count in range(len(pieces) + 1)]
    within = [re.fullmatch(WITHIN[span], text, re.DOTALL) is not None for text in texts]
    scanner = scanned(span, [piece.encode() for piece in pieces])
    assert scanner.num_tokens == sum(within[:-1])
    assert scanner.is_within == within[-1]


@given(pieces=st.lists(PIECES, max_size=12))
def test_what_comes_next_is_thinking_if_the_parser_says_so(pieces: list[str]) -> None:
    for span, state in ((OPENED, "open"), (MAY_OPEN, "")):
        parsed = parse_answer(THINK.parser(state), "".join((*pieces, "Q")))
        assert scanned(span, [piece.encode() for piece in pieces]).is_within == ("Q" in parsed.reasoning)


@given(pieces=st.lists(PIECES, max_size=12), cuts=st.lists(st.integers(0, 80), max_size=8))
def test_it_does_not_matter_where_the_text_is_cut(pieces: list[str], cuts: list[int]) -> None:
    data = "".join(pieces).encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for span in WITHIN:
        whole = scanned(span, [data[i : i + 1] for i in range(len(data))])
        cut = scanned(span, [data[start:end] for start, end in pairwise(places)])
        assert cut.is_within == whole.is_within


def limited(span: ThinkingSpan, max_tokens: int, words: list[bytes]) -> LimitedThinking:
    table = {**dict(enumerate(words)), 100: b"</thi", 101: b"nk>"}
    return LimitedThinking(ThinkingLimit(span, max_tokens, END), table, None)


def allowed(matcher: LimitedThinking) -> list[int]:
    mask = np.empty(16, np.uint8)
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()


def test_the_end_is_forced_when_the_limit_is_reached() -> None:
    matcher = limited(OPENED, 2, [b"a", b"b"])
    for _ in range(2):
        assert len(allowed(matcher)) == 128
        matcher.accept(0)
    for token_id in END:
        assert allowed(matcher) == [token_id]
        matcher.accept(token_id)
    for _ in range(5):
        assert len(allowed(matcher)) == 128
        matcher.accept(1)


def test_a_limit_of_nothing_ends_thinking_at_once() -> None:
    assert allowed(limited(OPENED, 0, [])) == [100]
    matcher = limited(MAY_OPEN, 0, [b"<think>", b"a"])
    assert len(allowed(matcher)) == 128
    matcher.accept(0)
    assert allowed(matcher) == [100]


def test_thinking_that_ends_by_itself_is_left_alone() -> None:
    matcher = limited(OPENED, 3, [b"a", b"</think>"])
    for token_id in (0, 1, *[0] * 9):
        assert len(allowed(matcher)) == 128
        matcher.accept(token_id)


def test_an_answer_without_thinking_has_no_limit() -> None:
    matcher = limited(MAY_OPEN, 1, [b" ", b"hm"])
    for token_id in (0, 0, 1, 1, 1, 1):
        assert len(allowed(matcher)) == 128
        matcher.accept(token_id)


def test_a_character_is_not_cut() -> None:
    first, second = "日".encode()[:2], "日".encode()[2:]
    matcher = limited(OPENED, 1, [first, second])
    matcher.accept(0)
    assert len(allowed(matcher)) == 128
    matcher.accept(1)
    assert allowed(matcher) == [100]


def test_all_thinking_of_an_answer_counts() -> None:
    matcher = limited(ANALYSIS, 3, [b"<think>", b"a", b"</think>"])
    for token_id in (0, 1, 2, 1, 0):
        assert len(allowed(matcher)) == 128
        matcher.accept(token_id)
    matcher.accept(1)
    assert allowed(matcher) == [100]


def test_a_marker_in_other_tokens_does_not_disturb_its_own() -> None:
    matcher = limited(OPENED, 1, [b"a</thi", b"nk>"])
    matcher.accept(0)
    assert allowed(matcher) == [100], "what could have become the end did not"
