"""The items of a request: as clients give them, and as they are kept.

What comes in gets a new id. Its old one only says which session it is of, and its status means nothing. Besides the kinds of
items.py there is item_reference: an item that the store has. Knows no HTTP library, no store, no engine, no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, TypeAdapter, ValidationInfo
from pydantic_core import PydanticCustomError

from deployments.http.cache_hints import BreakablePart
from deployments.http.function_tools import Name
from deployments.http.generation_body import MAX_MESSAGES, SessionKey
from deployments.http.parsing import MAX_NAME_CHARS, Body, validated_within
from deployments.responses.items import (
    ItemJson,
    NewId,
    call_item,
    message_item,
    output_text,
    reasoning_item,
    reasoning_text,
)

NOTHING: Mapping[str, ItemJson] = {}

# Of a call or its output: it may name a namespace, or a program as its caller, in OpenAI's API alone.
CALL_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "async": (False,),
    "caller": ({"type": "direct"},),
    "namespace": (),
}
# What OpenAI's client adds to its own objects, and labels.
CALL_IGNORED = frozenset({"async_", "created_by", "parsed_arguments", "status"})


def unsupported(message: str, **param: int | str) -> PydanticCustomError:
    """The error of a value that OpenAI's API knows, or may know one day."""
    return PydanticCustomError("unsupported_parameter", message, param or None)


def only(*passing: str) -> BeforeValidator:
    """Other values are known to OpenAI's API, or may be one day: not supported rather than invalid."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in passing:
            return value
        name = repr(value)[:MAX_NAME_CHARS]
        raise unsupported(f"{name} is not supported; supported: {', '.join(map(repr, passing))}")

    return BeforeValidator(check)


class TextPart(BreakablePart):
    """The only kind of content. An answer's part is taken back as it went out."""

    ignored = frozenset({"annotations", "logprobs"})

    type: Annotated[Literal["input_text", "output_text"], only("input_text", "output_text")]
    text: str

    def shown(self) -> dict[str, Any]:
        """As a part of what the client says."""
        return {"type": "input_text", "text": self.text, **self.kept_marks()}


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
_TEXT_PARTS: TypeAdapter[list[TextPart]] = TypeAdapter(TextParts)


def _as_output(output: Any, info: ValidationInfo) -> Any:
    """A text stays one."""
    if isinstance(output, str):
        return output
    return _TEXT_PARTS.validate_python(output, strict=True, extra=info.context, context=info.context)


class MessageItem(Body):
    """What a role says."""

    ignored = frozenset({"phase", "status"})

    type: Literal["message"] = "message"
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[TextParts, BeforeValidator(_as_parts, json_schema_input_type=str | TextParts)]

    def item(self, new_id: NewId) -> ItemJson:
        """As it is kept."""
        if self.role == "assistant":
            parts = [output_text(part.text) | part.kept_marks() for part in self.content]
        else:
            parts = [part.shown() for part in self.content]
        return message_item(new_id("msg"), self.role, parts)


class ReasoningPart(Body):
    """A piece of what was thought."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Body):
    """What the model thought, as it went out. A summary of it, and an encrypted form, say nothing here."""

    ignored = frozenset({"encrypted_content", "status", "summary"})

    type: Literal["reasoning"]
    id: str | None = None
    content: Annotated[list[ReasoningPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(default=[])

    def item(self, new_id: NewId) -> ItemJson:
        """As it is kept."""
        return reasoning_item(new_id("rs"), [reasoning_text(part.text) for part in self.content])


class CallItem(Body):
    """A call that the model made."""

    not_implemented = CALL_NOT_IMPLEMENTED
    ignored = CALL_IGNORED

    type: Literal["function_call"]
    id: str | None = None
    call_id: Name
    name: Name
    arguments: str

    def item(self, new_id: NewId) -> ItemJson:
        """As it is kept."""
        return call_item(new_id("fc"), self.call_id, self.name, self.arguments)


class CallOutputItem(Body):
    """The result of a call."""

    not_implemented = CALL_NOT_IMPLEMENTED
    ignored = CALL_IGNORED

    type: Literal["function_call_output"]
    id: str | None = None
    call_id: Name
    output: Annotated[str | list[TextPart], PlainValidator(_as_output, json_schema_input_type=str | TextParts)]
    name: Name | None = None

    def item(self, new_id: NewId) -> ItemJson:
        """As it is kept."""
        said: Any = self.output
        if not isinstance(said, str):
            said = [part.shown() for part in said]
        fields = {"call_id": self.call_id, "output": said} | ({} if self.name is None else {"name": self.name})
        return {"id": new_id("fco"), "type": "function_call_output", "status": "completed", **fields}


class ReferenceItem(Body):
    """An item that the store has, in its place."""

    type: Literal["item_reference"]
    id: SessionKey


InputItem = MessageItem | ReasoningItem | CallItem | CallOutputItem | ReferenceItem
_KINDS: Mapping[str, type[InputItem]] = {
    "message": MessageItem,
    "reasoning": ReasoningItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "item_reference": ReferenceItem,
}


def _as_item(value: Any, info: ValidationInfo) -> InputItem:
    """By its type alone, so that an error is about that kind. A message, and a reference, may come without one."""
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid", "must be an object")
    kind = value.get("type")
    if kind is None:
        kind = "item_reference" if set(value) == {"id"} else "message"
    if not isinstance(kind, str) or kind not in _KINDS:
        supported = ", ".join(map(repr, _KINDS))
        message = f"{repr(kind)[:MAX_NAME_CHARS]} is not supported; supported: {supported}"
        raise unsupported(message, param="type")
    return validated_within(_KINDS[kind], value | {"type": kind}, info)


def _as_new_item(value: Any, info: ValidationInfo) -> InputItem:
    """An item of a conversation is a new one."""
    item = _as_item(value, info)
    if isinstance(item, ReferenceItem):
        raise unsupported("'item_reference' is not supported in a conversation; give the item itself", param="type")
    return item


def _as_items(items: Any) -> Any:
    """A text is a user's message."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise PydanticCustomError("invalid", "must be a string or a list of items")
    return items


def _check_references(items: list[InputItem]) -> list[InputItem]:
    """A few bytes would stand for any number of large items."""
    ids = referenced_ids(items)
    if len(set(ids)) < len(ids):
        raise PydanticCustomError("invalid", "refers to the same item twice")
    return items


AnItem = Annotated[InputItem, PlainValidator(_as_item, json_schema_input_type=InputItem)]
SomeItems = Annotated[
    list[AnItem],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    AfterValidator(_check_references),
]
NewItem = MessageItem | ReasoningItem | CallItem | CallOutputItem
ANewItem = Annotated[InputItem, PlainValidator(_as_new_item, json_schema_input_type=NewItem)]
MAX_ITEMS = 20  # that one request may add to a conversation
FewItems = Annotated[list[ANewItem], Field(max_length=MAX_ITEMS)]
SomeFewItems = Annotated[list[ANewItem], Field(min_length=1, max_length=MAX_ITEMS)]


def text_or(kind: Any) -> BeforeValidator:
    """For a field that takes a text or a list of items of that kind."""
    return BeforeValidator(_as_items, json_schema_input_type=str | kind)


def tells_history(items: Iterable[InputItem]) -> bool:
    """Whether they tell a history, and not only what is new."""
    return any(not isinstance(i, MessageItem) or i.role == "assistant" for i in items)


def last_answer_id(items: Sequence[InputItem]) -> str | None:
    """The id that the client gives for the last item which the server may have said."""
    for item in reversed(items):
        if isinstance(item, (ReferenceItem, CallItem, ReasoningItem)) or (
            isinstance(item, MessageItem) and item.role == "assistant"
        ):
            return item.id
    return None


def referenced_ids(items: Iterable[InputItem]) -> tuple[str, ...]:
    """The items of the store that these refer to, in order."""
    return tuple(item.id for item in items if isinstance(item, ReferenceItem))


def new_items(
    items: Iterable[InputItem], new_id: NewId, stored: Mapping[str, ItemJson] = NOTHING
) -> tuple[ItemJson, ...]:
    """As they are kept, each with a new id.

    stored: the items that are referred to, by their ids.
    """
    return tuple(
        dict(stored[item.id]) | {"id": new_id(item.id.partition("_")[0])}
        if isinstance(item, ReferenceItem)
        else item.item(new_id)
        for item in items
    )
