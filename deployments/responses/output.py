"""The output items of a response as an answer grows, and the events that tell of them.

Knows neither the response around them nor the numbers of the events. Items come one after the other: all but the last one
are closed.

    answer --AnswerReader--> thinking, text, calls --Output--> items, and response.output_item.added ... done
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from deployments.http.answer_reader import AnswerReader, made_call_id
from deployments.responses.items import (
    ItemJson,
    NewId,
    call_item,
    joined_text,
    message_item,
    output_text,
    reasoning_item,
    reasoning_text,
)
from engine.dialogue.events import Arguments, CallCut, CallEnd, CallStart, Reasoning, Text
from engine.dialogue.tools import Tool
from engine.text.output import OutputDelta

Event = tuple[str, dict[str, Any]]


class _OpenItem(ABC):
    """An item that grows. index: its place in the output."""

    def __init__(self, index: int, item_id: str) -> None:
        self._index = index
        self._item_id = item_id
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def begin(self) -> list[Event]:
        """That it is there, still empty."""
        return [("response.output_item.added", {"output_index": self._index, "item": self._empty()})]

    def add(self, text: str) -> list[Event]:
        """That it goes on."""
        self._texts.append(text)
        return [self._of_text("delta", delta=text)]

    def end(self, status: str) -> list[Event]:
        """That it is closed."""
        return [("response.output_item.done", {"output_index": self._index, "item": self.item(status)})]

    @abstractmethod
    def item(self, status: str) -> ItemJson:
        """As it is now."""

    @abstractmethod
    def _empty(self) -> ItemJson: ...

    @abstractmethod
    def _of_text(self, what: str, **fields: Any) -> Event: ...

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": self._index}


class _TextItem(_OpenItem):
    """A message, or what was thought: an item with one part."""

    def __init__(self, index: int, item_id: str, *, is_thought: bool) -> None:
        super().__init__(index, item_id)
        self.is_thought = is_thought
        self._part = reasoning_text if is_thought else output_text

    def begin(self) -> list[Event]:
        return [*super().begin(), self._of_part("added")]

    def end(self, status: str) -> list[Event]:
        return [self._of_text("done", text=self.text), self._of_part("done"), *super().end(status)]

    def item(self, status: str) -> ItemJson:
        return self._with([self._part(self.text)], status)

    def _empty(self) -> ItemJson:
        return self._with([], "in_progress")

    def _with(self, parts: Sequence[dict[str, Any]], status: str) -> ItemJson:
        if self.is_thought:
            return reasoning_item(self._item_id, parts, status)
        return message_item(self._item_id, "assistant", parts, status)

    def _of_part(self, what: str) -> Event:
        return f"response.content_part.{what}", self._where() | {"content_index": 0, "part": self._part(self.text)}

    def _of_text(self, what: str, **fields: Any) -> Event:
        where = self._where() | {"content_index": 0}
        if self.is_thought:
            return f"response.reasoning_text.{what}", where | fields
        return f"response.output_text.{what}", where | fields | {"logprobs": []}


class _CallItem(_OpenItem):
    """A call; its text is that of its arguments."""

    def __init__(self, index: int, item_id: str, call_id: str, name: str) -> None:
        super().__init__(index, item_id)
        self._call_id = call_id
        self._name = name

    def end(self, status: str) -> list[Event]:
        return [self._of_text("done", arguments=self.text), *super().end(status)]

    def item(self, status: str) -> ItemJson:
        return call_item(self._item_id, self._call_id, self._name, self.text, status)

    def _empty(self) -> ItemJson:
        return self.item("in_progress")

    def _of_text(self, what: str, **fields: Any) -> Event:
        return f"response.function_call_arguments.{what}", self._where() | fields


class Output:
    """The items of one answer. items: those that are closed."""

    def __init__(self, response_id: str, new_id: NewId, tools: Sequence[Tool], *, is_empty: bool = False) -> None:
        """Nothing is said yet.

        new_id: gives the items theirs. tools: that the answer may call. is_empty: no answer is wanted.
        """
        self._is_empty = is_empty
        self.items: list[ItemJson] = []
        self._response_id = response_id
        self._new_id = new_id
        self._reader = AnswerReader(tools)
        self._open: _OpenItem | None = None

    def read(self, delta: OutputDelta) -> list[Event]:
        """What is new. The delta with a finish_reason closes the last item."""
        events: list[Event] = []
        for event in self._reader.read(delta):
            match event:
                case Text(text) | Reasoning(text):
                    events += self._say(text, is_thought=isinstance(event, Reasoning))
                case CallStart(index, name, call_id):
                    events += self._close("completed")
                    call_id = call_id or made_call_id(self._response_id, index)
                    events += self._begin(_CallItem(len(self.items), self._new_id("fc"), call_id, name))
                case Arguments(_, text) if self._open is not None:
                    events += self._open.add(text)
                case CallEnd():
                    events += self._close("completed")
                case CallCut():
                    events += self._close("incomplete")
        if delta.finish_reason is not None:
            if not (self.so_far() or self._is_empty):  # an answer that says nothing is an empty message
                events += self._begin(_TextItem(0, self._new_id("msg"), is_thought=False))
            events += self._close("incomplete" if delta.finish_reason == "length" else "completed")
        return events

    def so_far(self) -> list[ItemJson]:
        """All items, the last one perhaps in progress."""
        return [*self.items, *([] if self._open is None else [self._open.item("in_progress")])]

    def _say(self, text: str, *, is_thought: bool) -> list[Event]:
        events: list[Event] = []
        if not isinstance(self._open, _TextItem) or self._open.is_thought != is_thought:
            events += self._close("completed")
            item_id = self._new_id("rs" if is_thought else "msg")
            events += self._begin(_TextItem(len(self.items), item_id, is_thought=is_thought))
        assert self._open is not None
        return [*events, *self._open.add(text)]

    def _begin(self, item: _OpenItem) -> list[Event]:
        self._open = item
        return item.begin()

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        item, self._open = self._open, None
        self.items.append(item.item(status))
        return item.end(status)


def retold(items: Sequence[ItemJson]) -> list[Event]:
    """The events of an answer that is there already: the text of each item comes in one piece."""
    events: list[Event] = []
    for index, item in enumerate(items):
        again: _OpenItem
        if item["type"] == "function_call":
            again, text = _CallItem(index, item["id"], item["call_id"], item["name"]), item["arguments"]
        else:
            again = _TextItem(index, item["id"], is_thought=item["type"] == "reasoning")
            text = joined_text(item["content"])
        events += [*again.begin(), *(again.add(text) if text else []), *again.end(item["status"])]
    return events
