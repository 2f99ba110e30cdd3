"""The messages and tools of a chat request, as plain models and as what the engine takes.

Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from deployments.http.cache_hints import BreakablePart, Markable, part_marks
from deployments.http.function_tools import MAX_CALLS, Function, Name
from deployments.http.generation_body import MAX_MESSAGES
from deployments.http.parsing import MAX_NAME_CHARS, Body
from engine.dialogue import messages as dialogue
from engine.dialogue import tools as dialogue_tools

MESSAGE_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {"audio": (), "function_call": ()}
# What is not for the model: the content once more, from OpenAI's client; where it came from.
MESSAGE_IGNORED = frozenset({"annotations", "parsed"})
PART_IGNORED = frozenset({"annotations", "logprobs"})


PART_TYPES = ("text", "input_text", "output_text", "refusal")


def _check_part_type(kind: Any) -> Any:
    if kind not in PART_TYPES:
        message = f"{repr(kind)[:MAX_NAME_CHARS]} is not supported; supported: {', '.join(map(repr, PART_TYPES))}"
        raise PydanticCustomError("unsupported_parameter", message)
    return kind


class ChatTextPart(BreakablePart):
    """A part of a message's content, under the names that OpenAI's two APIs have for a text."""

    ignored = PART_IGNORED

    type: Annotated[Literal["text", "input_text", "output_text", "refusal"], BeforeValidator(_check_part_type)]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        name = "refusal" if self.type == "refusal" else "text"
        if getattr(self, name) is None:
            raise PydanticCustomError("missing", f"required in a part of type {self.type}", {"param": name})
        return self


ChatTextParts = Annotated[list[ChatTextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]


def _text_or_parts(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """A text stays one. A union of both would add names of its own to the place of an error."""

    def validate(content: Any, validate_parts: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise PydanticCustomError("invalid", "must be a text, or a list of parts")
        return validate_parts(content)

    parts = handler.generate_schema(ChatTextParts)
    either = handler.generate_schema(str | ChatTextParts)
    return core_schema.no_info_wrap_validator_function(validate, parts, json_schema_input_schema=either)


Content = Annotated[str | list[ChatTextPart], GetPydanticSchema(_text_or_parts)]


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


class Message(BreakablePart):
    """One message of the conversation. A mark on it is one on all of it."""

    not_implemented = MESSAGE_NOT_IMPLEMENTED
    ignored = MESSAGE_IGNORED

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    refusal: str | None = None
    name: Name | None = None
    tool_calls: Annotated[list[MessageCall], Field(max_length=MAX_CALLS, fail_fast=True)] = Field(default=[])
    tool_call_id: Name | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        for name, roles in (
            ("tool_calls", ("assistant",)),
            ("refusal", ("assistant",)),
            ("reasoning_content", ("assistant",)),
            ("reasoning", ("assistant",)),
            ("tool_call_id", ("tool", "function")),
        ):
            if getattr(self, name) and self.role not in roles:
                message = f"only allowed in a message of {' or '.join(roles)}"
                raise PydanticCustomError("invalid", message, {"param": name})
        says_else = self.tool_calls or self.refusal or self.reasoning_content or self.reasoning
        may_be_empty = self.role == "assistant" and says_else
        for name, is_needed in (
            ("content", not may_be_empty),
            ("tool_call_id", self.role == "tool"),
            ("name", self.role == "function"),
        ):
            if is_needed and getattr(self, name) is None:
                message = f"required in a message of {self.role}"
                raise PydanticCustomError("missing", message, {"param": name})
        return self

    @property
    def text(self) -> str:
        """All that is said; who refuses says it in place of the rest."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text or part.refusal or "" for part in content)
        return content or self.refusal or ""

    def value(self) -> dialogue.Message:
        """As the engine takes it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        calls = tuple(
            dialogue.ToolCall(call.function.name, call.function.arguments or "{}", call.id) for call in self.tool_calls
        )
        reasoning = self.reasoning_content or self.reasoning or ""
        name = self.name or ""
        return dialogue.Message(role, self.text, reasoning, calls, self.tool_call_id or "", name, self._cache_marks())

    def _cache_marks(self) -> tuple[dialogue.CacheMark, ...]:
        if not isinstance(self.content, list):
            return self.marks()
        parts = [(part, part.text or part.refusal or "") for part in self.content]
        return (*part_marks(parts, ends_message=not self.tool_calls), *self.marks())


def check_continued(messages: Sequence[Message], *, opens_answer: bool | None) -> None:
    """Raises PydanticCustomError if the last message is none that an answer can continue.

    opens_answer: the client's add_generation_prompt; None = not said.
    """
    last = messages[-1]
    if opens_answer:
        problem = "cannot be combined with add_generation_prompt: an answer continues a message or is a new one"
    elif last.role != "assistant" or not last.content or last.tool_calls:
        problem = "needs a last message of the assistant, with a text and without tool_calls"
    else:
        return
    raise PydanticCustomError("invalid", problem, {"param": "continue_final_message"})


class ToolDefinition(Markable):
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
