"""The items that turns are made of, as they are kept and shown, and the messages that they make.

An item is a dict as OpenAI's API shows it, with "type", "id" and "status". Knows no HTTP, no store, no engine, no Ray.

    message               what a role says, in parts: input_text, or output_text in an assistant message
    reasoning             what the model thought before
    function_call         a call that the model makes
    function_call_output  the result of one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from deployments.http.cache_hints import BreakablePart, part_marks
from engine.dialogue.messages import CacheMark, Message, ToolCall

ItemJson = dict[str, Any]
NewId = Callable[[str], str]  # from a prefix


def output_text(text: str) -> dict[str, Any]:
    """The part of an assistant's message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def reasoning_text(text: str) -> dict[str, Any]:
    """The part of what was thought."""
    return {"type": "reasoning_text", "text": text}


def message_item(item_id: str, role: str, parts: Sequence[dict[str, Any]], status: str = "completed") -> ItemJson:
    """What a role says."""
    return {"id": item_id, "type": "message", "status": status, "role": role, "content": list(parts)}


def reasoning_item(item_id: str, parts: Sequence[dict[str, Any]], status: str = "completed") -> ItemJson:
    """What the model thought; there is no other model that would summarise it."""
    return {"id": item_id, "type": "reasoning", "status": status, "summary": [], "content": list(parts)}


def call_item(item_id: str, call_id: str, name: str, arguments: str, status: str = "completed") -> ItemJson:
    """A call. arguments: a JSON text as the model wrote it, cut short if the status is not "completed"."""
    fields = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"id": item_id, "type": "function_call", "status": status, **fields}


# The kinds of items that an answer is made of.
ANSWER_KINDS = ("reasoning", "message", "function_call")


def is_answer(item: ItemJson) -> bool:
    """Whether the model said it."""
    return bool(item["type"] in ANSWER_KINDS and item.get("role", "assistant") == "assistant")


def answers_something(item: ItemJson) -> bool:
    """Whether it says nothing without the items before it."""
    return is_answer(item) or item["type"] == "function_call_output"


def messages_of(items: Iterable[ItemJson], instructions: str | None = None) -> tuple[Message, ...]:
    """What a chat template is given: instructions first, as the system's; a developer is the system.

    What the model thought, said and called in one turn is one message, as it was when the model gave it.
    """
    messages = [] if instructions is None else [Message("system", instructions)]
    answer: list[ItemJson] = []
    for item in items:
        if answer and not _goes_on(answer, item):
            messages.append(_answer_message(answer))
            answer = []
        if is_answer(item):
            answer.append(item)
        elif item["type"] == "function_call_output":
            output = item["output"] if isinstance(item["output"], str) else joined_text(item["output"])
            marks = marks_of(item["output"])
            messages.append(
                Message("tool", output, tool_call_id=item["call_id"], name=item.get("name", ""), cache_marks=marks)
            )
        else:
            role = "system" if item["role"] == "developer" else item["role"]
            messages.append(Message(role, joined_text(item["content"]), cache_marks=marks_of(item["content"])))
    if answer:
        messages.append(_answer_message(answer))
    return tuple(messages)


def _goes_on(answer: Sequence[ItemJson], item: ItemJson) -> bool:
    """Whether an item belongs to the same turn of the model as those before it.

    A turn thinks only at its beginning, and a message right behind a message is a turn of its own.
    """
    kind, before = str(item["type"]), str(answer[-1]["type"])
    if not is_answer(item) or (kind == "reasoning" and before != "reasoning"):
        return False
    return kind != "message" or before != "message"


def _answer_message(answer: Sequence[ItemJson]) -> Message:
    def said(kind: str) -> str:
        return "".join(joined_text(item["content"]) for item in answer if item["type"] == kind)

    calls = tuple(
        ToolCall(item["name"], item["arguments"] or "{}", item["call_id"])
        for item in answer
        if item["type"] == "function_call"
    )
    parts = [part for item in answer if item["type"] == "message" for part in item["content"]]
    return Message("assistant", said("message"), said("reasoning"), calls, cache_marks=marks_of(parts))


def marks_of(parts: str | Sequence[Mapping[str, Any]]) -> tuple[CacheMark, ...]:
    """What is marked for the cache in a message with these parts."""
    if isinstance(parts, str) or not any(name in part for part in parts for name in BreakablePart.model_fields):
        return ()
    marked = [BreakablePart.of(part) for part in parts]
    return part_marks([(mark, part["text"]) for mark, part in zip(marked, parts, strict=True)])


def joined_text(parts: Iterable[Mapping[str, Any]]) -> str:
    """What the parts of a content say."""
    return "".join(part["text"] for part in parts)
