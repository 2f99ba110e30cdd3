"""The messages of a Messages request and the blocks that they are made of, as plain models and as what the engine takes.

Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.http.cache_hints import Markable, MarkablePart, part_marks
from deployments.http.function_tools import MAX_CALLS, Name
from deployments.http.generation_body import MAX_MESSAGES
from deployments.http.parsing import MAX_NAME_CHARS, Body
from deployments.messages.signatures import signature
from deployments.routing.billing_line import without_billing_line
from engine.dialogue import messages as dialogue

# What is left to do for a client whose blocks these models cannot read.
REMEDIES: Mapping[str, str] = {
    "image": "the model reads text only: describe the image in a text block",
    "document": "the model reads text only: send the document's text in a text block",
    "search_result": "send what was found in a text block",
}
MAX_BLOCKS = MAX_MESSAGES
ERROR_PREFIX = "Error: "


def _check_type(*known: str) -> BeforeValidator:
    def check(block: Any) -> Any:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str) or kind in known:
            return block  # what is wrong with it is for pydantic to say
        remedy = REMEDIES.get(kind, f"blocks here are of type {', '.join(known)}")
        message = "blocks of type {kind} are not supported; {remedy}"
        raise PydanticCustomError(
            "unsupported_parameter", message, {"kind": repr(kind)[:MAX_NAME_CHARS], "remedy": remedy}
        )

    return BeforeValidator(check)


def _as_blocks(content: Any) -> Any:
    """A text is short for one block of it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("invalid", "must be a string or a list of blocks")
    return content


class TextBlock(MarkablePart):
    ignored = frozenset({"citations", "parsed_output"})

    type: Literal["text"]
    text: str


class ThinkingBlock(Markable):
    """What the assistant thought. signature: see signatures.py; empty = the client has none."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Markable):
    """Thinking that another server keeps to itself; nothing of it can be read here."""

    ignored = frozenset({"data"})

    type: Literal["redacted_thinking"]


class ToolUseBlock(Markable):
    """A call that the assistant made."""

    ignored = frozenset({"caller", "toolset_name"})

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]

    def call(self) -> dialogue.ToolCall:
        return dialogue.ToolCall(self.name, json.dumps(self.input, ensure_ascii=False), self.id)


TextBlocks = Annotated[list[Annotated[TextBlock, _check_type("text")]], Field(max_length=MAX_BLOCKS, fail_fast=True)]
Texts = Annotated[TextBlocks, BeforeValidator(_as_blocks, json_schema_input_type=str | TextBlocks)]


class ToolResultBlock(MarkablePart):
    """What a call gave."""

    ignored = frozenset({"toolset_name"})

    type: Literal["tool_result"]
    tool_use_id: Name
    content: Texts = Field(default=[])
    is_error: bool = False

    def message(self, tool_name: str) -> dialogue.Message:
        """Chat templates have no place for an error, so the text says it."""
        prefix = ERROR_PREFIX if self.is_error else ""
        marks = (*text_marks(self.content, start=len(prefix)), *self.marks())
        text = prefix + joined(self.content)
        return dialogue.Message("tool", text, tool_call_id=self.tool_use_id, name=tool_name, cache_marks=marks)


Block = Annotated[
    Annotated[
        TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
    ],
    _check_type("text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]
Blocks = Annotated[list[Block], Field(max_length=MAX_BLOCKS, fail_fast=True)]
ROLES: Mapping[type[Body], str] = {
    ThinkingBlock: "assistant",
    RedactedThinkingBlock: "assistant",
    ToolUseBlock: "assistant",
    ToolResultBlock: "user",
}


class Message(Body):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[Blocks, BeforeValidator(_as_blocks, json_schema_input_type=str | Blocks)]

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        for block in self.content:
            role = ROLES.get(type(block), self.role)
            if role != self.role:
                message = f"{block.type} blocks are only allowed in a message of the {role}"
                raise PydanticCustomError("invalid", message, {"param": "content"})
        if sum(isinstance(block, ToolUseBlock) for block in self.content) > MAX_CALLS:
            raise PydanticCustomError("invalid", f"at most {MAX_CALLS} tool_use blocks", {"param": "content"})
        return self


def joined(blocks: Iterable[TextBlock]) -> str:
    """The text of blocks that a client wrote: each begins a line, as they would run into one another otherwise."""
    return "\n".join(block.text for block in blocks)


def text_marks(blocks: Iterable[TextBlock], *, start: int = 0) -> tuple[dialogue.CacheMark, ...]:
    """What is marked for the cache in a content of `start` other characters and these blocks, joined."""
    return part_marks([(block, block.text) for block in blocks], start=start, separator="\n")


def system_message(blocks: Sequence[TextBlock]) -> dialogue.Message | None:
    """Without the line about billing, and without blocks that say nothing; None = nothing is said."""
    shown = [block.model_copy(update={"text": without_billing_line(block.text)}) for block in blocks[:1]]
    said = [block for block in (*shown, *blocks[1:]) if block.text]
    return dialogue.Message("system", joined(said), cache_marks=text_marks(said)) if said else None


def dialogue_messages(messages: Sequence[Message], model: str) -> Iterator[dialogue.Message]:
    """The same as chat templates have them. Consecutive messages of one role are one.

    Results of calls stand before the text that came with them. Thinking with a signature that another model or another
    text has is left out.
    """
    names: dict[str, str] = {}
    for role, run in groupby(messages, key=lambda message: message.role):
        blocks = [block for message in run for block in message.content]
        texts = [block for block in blocks if isinstance(block, TextBlock)]
        if role == "assistant":
            calls = tuple(block.call() for block in blocks if isinstance(block, ToolUseBlock))
            names |= {call.call_id: call.name for call in calls}
            thoughts = (
                block.thinking for block in blocks if isinstance(block, ThinkingBlock) and _is_own(block, model)
            )
            # An answer's blocks are pieces of one text: joined, they are what was generated.
            others = [block for block in blocks if isinstance(block, Markable)]
            marks = part_marks([(block, block.text) for block in texts], ends_message=not calls)
            marks += tuple(mark for block in others for mark in block.marks())
            text = "".join(block.text for block in texts)
            yield dialogue.Message(role, text, "".join(thoughts), calls, cache_marks=marks)
            continue
        results = [block for block in blocks if isinstance(block, ToolResultBlock)]
        for result in results:
            yield result.message(names.get(result.tool_use_id, ""))
        if texts or not results:
            yield dialogue.Message(role, joined(texts), cache_marks=text_marks(texts))


def _is_own(block: ThinkingBlock, model: str) -> bool:
    return block.signature in ("", signature(block.thinking, model))
