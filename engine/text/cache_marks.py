"""From what a client marks in its messages to ranges of tokens, and for how long each is to be kept.

The places are found in the rendered prompt, so they are right for any chat template. Knows no tokenizer and no KV.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from engine.core.retention import MAX_SPANS, NEUTRAL_PRIORITY, KeptSpan, RetentionHint
from engine.dialogue.messages import Message
from engine.errors import InvalidParameterError
from engine.text.transcript import common_prefix_len

# What OpenAI's API keeps a marked beginning for if the request does not say.
DEFAULT_TTL_S = 1800.0
# Pieces of one request that are not worth keeping: each makes two spans, with what is between it and the next.
MAX_PIECES = MAX_SPANS // 2 - 2


@dataclass(frozen=True, slots=True)
class CacheWish:
    """What a client wants of the cache for one request, besides the marks in its messages.

    ttl_s: the whole context is to be kept for at least so long, and what is up to marks without a time of their own; None =
        it says nothing of the whole.
    keeps_only_marked: what lies behind the last mark is not worth keeping.
    compared_to: the id of an earlier request, to be told what of its context could not be used again.
    """

    ttl_s: float | None = None
    keeps_only_marked: bool = False
    compared_to: str | None = None

    @property
    def mark_ttl_s(self) -> float:
        """What marks mean that say no time."""
        return DEFAULT_TTL_S if self.ttl_s is None else self.ttl_s


NO_WISH = CacheWish()


class TextMark(NamedTuple):
    """A mark in characters of the rendered prompt; see CacheMark. start None = a beginning that is worth keeping."""

    start: int | None
    end: int
    ttl_s: float | None


def has_marks(messages: Sequence[Message]) -> bool:
    """Whether any of them is marked."""
    return any(message.cache_marks for message in messages)


_LAST = -1


class _Place(NamedTuple):
    """In the content of a message, _LAST = at its end; behind the last message = at the end of the prompt."""

    message: int
    char: int


class _Mark(NamedTuple):
    """ends: the first of these that is shown counts."""

    start: _Place | None
    ends: tuple[_Place, ...]
    ttl_s: float | None


def _marks_of(messages: Sequence[Message], default_ttl_s: float) -> list[_Mark]:
    """Those that count: of beginnings, one that a longer beginning covers for as long says nothing more."""
    counting: list[_Mark] = []
    longest_s, num_pieces = 0.0, 0
    for index in reversed(range(len(messages))):
        for mark in reversed(messages[index].cache_marks):
            ends: tuple[_Place, ...] = (_Place(index, _LAST if mark.end is None else mark.end),)
            if mark.start is not None:
                counting.append(_Mark(_Place(index, mark.start), ends, mark.ttl_s))
                num_pieces += 1
                continue
            if mark.end is None:  # what the template writes behind the content is a part of the message
                ends = (_Place(index + 1, 0), *ends)
            ttl_s = default_ttl_s if mark.ttl_s is None else mark.ttl_s
            if ttl_s > longest_s:
                longest_s = ttl_s
                counting.append(_Mark(None, ends, mark.ttl_s))
    if num_pieces > MAX_PIECES:
        raise InvalidParameterError(
            f"{num_pieces} parts are marked as not worth keeping, and at most {MAX_PIECES} may be; mark the largest ones",
            param="prompt",
        )
    return counting


def _visible(place: _Place, messages: Sequence[Message]) -> _Place:
    """The same place without the white space around a content, which some templates leave out."""
    content = messages[place.message].content
    last = len(content.rstrip())
    char = last if place.char == _LAST else min(place.char, last)
    return _Place(place.message, max(char, min(last, len(content) - len(content.lstrip()))))


def find_places(
    messages: Sequence[Message],
    places: Sequence[tuple[int, int]],
    text: str,
    render: Callable[[Sequence[Message]], str],
) -> list[int | None]:
    """Where in `text`, which the messages render to, places in their contents are; None = they are not shown there.

    Renders once more, with a name at each place; linear in the text.

    places: (message, character of its content) each, in any order.
    """
    stem = secrets.token_hex(8)  # not in the text, unless by a miracle
    ordered = sorted(set(places))
    names = {place: f"{stem}{number:05d}" for number, place in enumerate(ordered)}
    named = list(messages)
    for index, char in reversed(ordered):
        content = named[index].content
        named[index] = replace(named[index], content=f"{content[:char]}{names[index, char]}{content[char:]}")
    try:
        marked = render(named)
    except InvalidParameterError:  # a template may refuse any text
        return [None] * len(places)
    found: dict[tuple[int, int], int] = {}
    at_text, at_marked = 0, 0
    for name in re.finditer(f"{stem}(\\d{{5}})", marked):  # a template may change the order, and repeat a text
        piece = marked[at_marked : name.start()]
        at_text += common_prefix_len(text[at_text : at_text + len(piece)], piece)
        at_marked = name.end()
        found.setdefault(ordered[int(name[1])], at_text)
    return [found.get(place) for place in places]


def find_marks(
    messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str], default_ttl_s: float
) -> tuple[list[TextMark], int]:
    """The marks that count, in characters of `text`, and how many more the template does not show the places of.

    default_ttl_s: of marks that say no time. Raises InvalidParameterError if too many pieces are marked.
    """
    marks = _marks_of(messages, default_ttl_s)
    wanted = {place for mark in marks for place in (mark.start, *mark.ends) if place is not None}
    inner = [place for place in wanted if place.message < len(messages)]
    places = [_visible(place, messages) for place in inner]
    at = dict(zip(inner, find_places(messages, places, text, render), strict=True)) if inner else {}
    at |= dict.fromkeys(wanted.difference(inner), len(text))
    found: list[TextMark] = []
    for mark in marks:
        start = None if mark.start is None else at[mark.start]
        end = next((at[place] for place in mark.ends if at[place] is not None), None)
        if end is not None and (mark.start is None or start is not None):
            found.append(TextMark(start, end, mark.ttl_s))
    return found, len(marks) - len(found)


def hint_of(
    wish: CacheWish, marks: Sequence[TextMark] = (), count_tokens: Callable[[int], int] = lambda _: 0
) -> RetentionHint | None:
    """What is to become of the context, in tokens; None = nothing is said of it.

    A piece that is not worth keeping is so whatever else covers it; else the longest time counts.

    marks: in characters. count_tokens: how many tokens are in front of a character; asked in ascending order.
    """
    if not marks and wish.ttl_s is None and not wish.keeps_only_marked:
        return None
    chars = sorted({char for mark in marks for char in (mark.start, mark.end) if char is not None})
    tokens = {char: count_tokens(char) for char in chars}
    pieces = [(tokens[mark.start], tokens[mark.end]) for mark in marks if mark.start is not None]
    kept = [
        (tokens[mark.end], wish.mark_ttl_s if mark.ttl_s is None else mark.ttl_s)
        for mark in marks
        if mark.start is None
    ]
    whole = [] if wish.keeps_only_marked or wish.ttl_s is None else [wish.ttl_s]

    def span_at(start: int, end: int | None) -> KeptSpan | None:
        if any(first <= start < last for first, last in pieces):
            return KeptSpan(start, end, priority=0)
        times = whole + [ttl_s for last, ttl_s in kept if start < last]
        return KeptSpan(start, end, ttl_s=max(times)) if times else None

    starts = [0, *sorted(set(tokens.values()) - {0})]
    ranges = zip(starts, [*starts[1:], None], strict=True)
    spans = _joined(span for span in (span_at(start, end) for start, end in ranges) if span is not None)
    return RetentionHint(tuple(spans), rest_priority=0 if wish.keeps_only_marked else NEUTRAL_PRIORITY)


def _joined(spans: Iterable[KeptSpan]) -> list[KeptSpan]:
    """The same with neighbours that say the same as one."""
    joined: list[KeptSpan] = []
    for span in spans:
        if joined and joined[-1] == replace(span, start=joined[-1].start, end=span.start):
            joined[-1] = replace(joined[-1], end=span.end)
        else:
            joined.append(span)
    return joined
