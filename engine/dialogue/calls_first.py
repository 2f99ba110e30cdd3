"""Reads an answer that is either calls or a text of a given form, whose contents may look like a call."""

from __future__ import annotations

from collections.abc import Iterable

from engine.dialogue.events import CallStart, Event, Parser, Text


class CallsFirstParser:
    """Reads what begins with a call as calls, and all of anything else as text. See Parser."""

    def __init__(self, calls: Parser) -> None:
        self._calls = calls
        self._untold = ""  # fed to it, and in no event of it yet
        self._has_call = False
        self._is_text = False

    def feed(self, text: str) -> list[Event]:
        """See Parser.feed."""
        if self._is_text:
            return [Text(text)] if text else []
        if self._has_call:
            return self._calls.feed(text)
        self._untold += text
        return self._decide(self._calls.feed(text))

    def finish(self, end_token: str = "") -> list[Event]:
        """See Parser.finish."""
        if self._is_text:
            return []
        events = self._calls.finish(end_token)
        return events if self._has_call else self._decide(events)

    def _decide(self, events: Iterable[Event]) -> list[Event]:
        told: list[Event] = []
        for event in events:
            if isinstance(event, Text) and not self._has_call:
                self._is_text = True
                return [*told, Text(self._untold)]
            self._has_call |= isinstance(event, CallStart)
            self._untold = self._untold[len(event.source) :]
            told.append(event)
        return told
