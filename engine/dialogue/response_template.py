"""Answers read by transformers' own parser, for models that ship a `response_template`.

Its arguments are told when a call is complete, as transformers read them. Where it raises (a malformed call, an answer that
ends within one), what it could not read is text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.dialogue.events import Arguments, CallEnd, CallStart, Event, Markup, Reasoning, Text, merge_events
from engine.dialogue.tools import Tool

REASONING_FIELDS = frozenset(["reasoning_content", "reasoning", "thinking"])


class ResponseTemplateParser:
    """See engine.dialogue.events.Parser."""

    def __init__(self, template: Mapping[str, Any], tools: Sequence[Tool], prompt: str) -> None:
        """A parser of the answer to `prompt`, of a model whose tokenizer has this `response_template`."""
        from transformers.utils.chat_parsing import ResponseParser  # takes a second, and few models need it

        definitions = [tool.definition() for tool in tools]
        self._parser: Any = ResponseParser(dict(template), prompt, tools=definitions)
        self._unaccounted = ""  # given to it, and in no event of it yet
        self._region: list[str] = []
        self._num_calls = 0
        self._has_failed = False
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """See Parser.feed."""
        if self._has_failed:
            return [Text(text)] if text else []
        # By characters: an exception takes with it the events of all that was given in the same call.
        for num_read, character in enumerate(text, start=1):
            self._unaccounted += character
            try:
                self._take(self._parser.feed(character))
            except Exception:  # it raises ValueError by design, but runs a model's own patterns over any text
                self._unaccounted += text[num_read:]
                self._fail()
                break
        return self._told()

    def finish(self, end_token: str = "") -> list[Event]:
        """See Parser.finish."""
        if not self._has_failed:
            try:
                _, events = self._parser.finalize()
                self._take(events)
                if self._unaccounted:
                    self._events.append(Markup(self._account(len(self._unaccounted))))
            except Exception:
                self._fail()
        return self._told()

    def _told(self) -> list[Event]:
        events, self._events = self._events, []
        return merge_events(events)

    def _fail(self) -> None:
        """From here on everything is text, what was not told included."""
        self._has_failed = True
        if text := "".join(self._region) + self._account(len(self._unaccounted)):
            self._events.append(Text(text))

    def _account(self, num_chars: int) -> str:
        source, self._unaccounted = self._unaccounted[:num_chars], self._unaccounted[num_chars:]
        return source

    def _take(self, events: Sequence[Mapping[str, Any]]) -> None:
        for event in events:
            name = event["field"]
            if name == "tool_calls":
                self._take_call(event)
            elif event["type"] == "region_chunk":
                text: str = event["text"]
                if before := self._account(self._unaccounted.find(text)):
                    self._events.append(Markup(before))
                self._account(len(text))
                self._events.append(Reasoning(text) if name in REASONING_FIELDS else Text(text))

    def _take_call(self, event: Mapping[str, Any]) -> None:
        if event["type"] == "region_chunk":
            text: str = event["text"]
            self._region.append(self._account(self._unaccounted.find(text) + len(text)))
        elif event["type"] == "region_close":
            values = event["value"] if isinstance(event["value"], list) else [event["value"]]
            calls = [_read_call(value) for value in values]
            source = "".join(self._region)
            self._region.clear()
            for name, arguments in calls:
                self._events += [
                    CallStart(self._num_calls, name, "", source),
                    Arguments(self._num_calls, arguments),
                    CallEnd(self._num_calls),
                ]
                source = ""
                self._num_calls += 1


def _read_call(value: Any) -> tuple[str, str]:
    """(name, arguments as JSON). Raises ValueError if it is no call."""
    function = value.get("function", value) if isinstance(value, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters", {}))
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    text.encode()
    return name, text
