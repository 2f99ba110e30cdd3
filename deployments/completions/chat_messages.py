"""The messages and tools of a chat request, as plain models and as what the engine takes.

Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.http.function_tools import MAX_CALLS, Function, Name
from deployments.http.parsing import Body
from engine.dialogue import messages as dialogue
from engine.dialogue import tools as dialogue_tools

MESSAGE_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    # What OpenAI's client puts in an assistant message that is sent back as it came.
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}


def _joined_text(content: Any) -> Any:
    """A list of text parts as one text; everything else is for pydantic to judge."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "unsupported_parameter",
                'only {"type": "text", "text": ...} parts are supported',
                {"param": index},
            )
        texts.append(part["text"])
    return "".join(texts)


class ChatTextPart(BaseModel):  # for the served document; _joined_text takes these apart
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """What a call calls. arguments: a JSON text."""

    ignored = frozenset({"parsed_arguments"})  # the same once more, from OpenAI's client

    name: Name
    arguments: str = "{}"


class MessageCall(Body):
    """A call that an assistant's message made."""

    ignored = frozenset({"index"})

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of the conversation."""

    not_implemented = MESSAGE_NOT_IMPLEMENTED
    ignored = frozenset({"parsed"})  # the content once more, from OpenAI's client

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, BeforeValidator(_joined_text, json_schema_input_type=str | list[ChatTextPart])] = (
        None
    )
    name: Name | None = None
    tool_calls: Annotated[list[MessageCall], Field(max_length=MAX_CALLS, fail_fast=True)] = Field(default=[])
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        for name, roles in (
            ("tool_calls", ("assistant",)),
            ("reasoning_content", ("assistant",)),
            ("reasoning", ("assistant",)),
            ("tool_call_id", ("tool", "function")),
        ):
            if getattr(self, name) and self.role not in roles:
                message = f"only allowed in a message of {' or '.join(roles)}"
                raise PydanticCustomError("invalid", message, {"param": name})
        may_be_empty = self.role == "assistant" and (self.tool_calls or self.reasoning_content or self.reasoning)
        for name, is_needed in (
            ("content", not may_be_empty),
            ("tool_call_id", self.role == "tool"),
            ("name", self.role == "function"),
        ):
            if is_needed and getattr(self, name) is None:
                message = f"required in a message of {self.role}"
                raise PydanticCustomError("missing", message, {"param": name})
        return self

    def value(self) -> dialogue.Message:
        """As the engine takes it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        calls = tuple(
            dialogue.ToolCall(call.function.name, call.function.arguments or "{}", call.id) for call in self.tool_calls
        )
        reasoning = self.reasoning_content or self.reasoning or ""
        return dialogue.Message(role, self.content or "", reasoning, calls, self.tool_call_id or "", self.name or "")


class ToolDefinition(Body):
    """A tool; only functions are."""

    type: Literal["function"]
    function: Function

    def value(self) -> dialogue_tools.Tool:
        """As the engine takes it."""
        return self.function.value()


class NamedFunction(Body):
    """The function that a choice names."""

    name: Name


class NamedToolChoice(Body):  # for the served document; ToolChoice reads both
    type: Literal["function"]
    function: NamedFunction


class ToolChoice(Body):
    """Whether the answer has to call something."""

    type: Literal["auto", "none", "required", "function"]
    function: NamedFunction | None = None

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.function is not None) != (self.type == "function"):
            message = "has to be there if, and only if, type is function"
            raise PydanticCustomError("invalid", message, {"param": "function"})
        return self

    def value(self) -> dialogue_tools.ToolChoice:
        """As the engine takes it."""
        if self.function is not None:
            return dialogue_tools.ToolChoice("named", self.function.name)
        return dialogue_tools.ToolChoice(self.type)


def choice_as_object(choice: Any) -> Any:
    """A word is short for an object with that type; a function is named in an object only."""
    if choice == "function":
        raise PydanticCustomError("invalid", 'must be "auto", "none", "required", or an object that names a function')
    return {"type": choice} if isinstance(choice, str) else choice
