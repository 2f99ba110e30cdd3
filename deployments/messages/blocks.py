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


class Part(Body):
    """A part of a request, which may be marked for the cache. Everything is cached here anyway."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Part):
    ignored = frozenset({"citations", "parsed_output"})

    type: Literal["text"]
    text: str


class ThinkingBlock(Part):
    """What the assistant thought. signature: see signatures.py; empty = the client has none."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Part):
    """Thinking that another server keeps to itself; nothing of it can be read here."""

    ignored = frozenset({"data"})

    type: Literal["redacted_thinking"]


class ToolUseBlock(Part):
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


class ToolResultBlock(Part):
    """What a call gave."""

    ignored = frozenset({"toolset_name"})

    type: Literal["tool_result"]
    tool_use_id: Name
    content: Texts = Field(default=[])
    is_error: bool = False

    def message(self, tool_name: str) -> dialogue.Message:
        """Chat templates have no place for an error, so the text says it."""
        text = (ERROR_PREFIX if self.is_error else "") + joined(self.content)
        return dialogue.Message("tool", text, tool_call_id=self.tool_use_id, name=tool_name)


Block = Annotated[
    Annotated[
        TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
    ],
    _check_type("text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]
Blocks = Annotated[list[Block], Field(max_length=MAX_BLOCKS, fail_fast=True)]
ROLES: Mapping[type[Part], str] = {
    ThinkingBlock: "assistant",
    RedactedThinkingBlock: "assistant",
    ToolUseBlock: "assistant",
    ToolResultBlock: "user",
}


class Message(Part):
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


def system_text(blocks: Sequence[TextBlock]) -> str:
    """Of a system prompt; without the line about billing, and without blocks that say nothing."""
    texts = [block.text for block in blocks]
    texts[:1] = map(without_billing_line, texts[:1])
    return "\n".join(filter(None, texts))


def marked(parts: Iterable[Part]) -> bool:
    """Whether a part is marked for the cache, or one within it."""
    return any(
        part.cache_control is not None or (isinstance(part, (Message, ToolResultBlock)) and marked(part.content))
        for part in parts
    )


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
            yield dialogue.Message(role, "".join(block.text for block in texts), "".join(thoughts), calls)
            continue
        results = [block for block in blocks if isinstance(block, ToolResultBlock)]
        for result in results:
            yield result.message(names.get(result.tool_use_id, ""))
        if texts or not results:
            yield dialogue.Message(role, joined(texts))


def _is_own(block: ThinkingBlock, model: str) -> bool:
    return block.signature in ("", signature(block.thinking, model))
