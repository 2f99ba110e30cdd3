"""What a parser says of an answer, piece by piece, and the message that the pieces make. Plain values.

Each event carries as `source` the characters of the answer that it came from: joined in order they are the answer, so that no
character is lost or told twice, whatever the model wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str

    @property
    def source(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer's content."""

    text: str

    @property
    def source(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Markup:
    """Characters that are neither: markers, and white space around them."""

    source: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins.

    index: its number among the calls of this answer, from 0.
    call_id: the id that the model wrote; empty if its format has none.
    """

    index: int
    name: str
    call_id: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of a call's arguments; all pieces of a complete call, joined, are the text of a JSON object."""

    index: int
    text: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete."""

    index: int
    source: str = ""


@dataclass(frozen=True, slots=True)
class CallCut:
    """A call goes no further, and its arguments are incomplete: the answer ended or stopped making sense."""

    index: int
    source: str = ""


Event = Reasoning | Text | Markup | CallStart | Arguments | CallEnd | CallCut


class Parser(Protocol):
    """Turns one answer into events as its text comes. Never raises, whatever the text is."""

    def feed(self, text: str) -> list[Event]:
        """The events of the next piece of the answer; an end that can still become a marker is held back."""

    def finish(self, end_token: str = "") -> list[Event]:
        """The last events.

        end_token: the text of the token that ended the answer, empty if none did; it counts if it is one of the markers.
        """


def merge_events(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbours of one kind made one: equal however the answer was cut."""
    merged: list[Event] = []
    # Joined at once: one after the other, the first pieces would be copied as often as there are pieces.
    for _, neighbours in groupby(events, key=lambda event: (type(event), getattr(event, "index", None))):
        row = list(neighbours)
        source = "".join(event.source for event in row)
        match row[0]:
            case Text() | Reasoning() | Markup() as first:
                merged.append(type(first)(source))
            case Arguments(index):
                merged.append(Arguments(index, "".join(e.text for e in row if isinstance(e, Arguments)), source))
            case _:
                merged += row
    return merged


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A call of a tool as the model wrote it.

    arguments: the text of a JSON object, as generated; cut short if not `is_complete`.
    call_id: as in CallStart.
    """

    name: str
    arguments: str
    call_id: str = ""
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """One answer: what was thought, what was said, what was called."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ParsedCall, ...] = field(default=())


def gather(events: Iterable[Event]) -> ParsedAnswer:
    """The message that all events of an answer make."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ParsedCall] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case Text(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(_, name, call_id):
                calls.append(ParsedCall(name, "", call_id, is_complete=False))
                arguments.append([])
            case Arguments(index, text):
                arguments[index].append(text)
            case CallEnd(index):
                calls[index] = replace(calls[index], is_complete=True)
            case _:
                pass
    whole = tuple(replace(call, arguments="".join(pieces)) for call, pieces in zip(calls, arguments, strict=True))
    return ParsedAnswer("".join(content), "".join(reasoning), whole)


def parse_answer(parser: Parser, text: str, end_token: str = "") -> ParsedAnswer:
    """The message of a whole answer."""
    events: Sequence[Event] = [*parser.feed(text), *parser.finish(end_token)]
    return gather(events)
