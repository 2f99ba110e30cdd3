"""The tools of a request to the Responses API, in which a function is flat, and the choice among them.

Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from deployments.http.function_tools import MAX_TOOLS, Function, Name
from deployments.http.parsing import MAX_NAME_CHARS, Body, validated_within
from deployments.responses.input_items import unsupported
from engine.dialogue import tools as dialogue_tools

# What asks OpenAI's servers to load a function later, or to call it from a program.
TOOL_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
}


class FunctionTool(Function):
    """A function that the client offers. output_schema: the model is not told of it."""

    not_implemented = TOOL_NOT_IMPLEMENTED
    ignored = frozenset({"async_", "output_schema"})

    type: Literal["function"]

    def shown(self) -> dict[str, Any]:
        """As the response repeats it."""
        fields = {"description": self.description, "parameters": self.parameters, "strict": self.strict}
        return {"type": "function", "name": self.name, **fields}


def _check_is_function(tool: Any) -> Any:
    """First of all: a tool of another kind has other fields."""
    if isinstance(tool, dict) and tool.get("type", "function") != "function":
        name = repr(tool["type"])[:MAX_NAME_CHARS]
        message = f"{name} is not supported: this server runs no tools; offer a function, and run it in the client"
        raise unsupported(message, param="type")
    return tool


ATool = Annotated[FunctionTool, BeforeValidator(_check_is_function, json_schema_input_type=FunctionTool)]
SomeTools = Annotated[list[ATool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class FunctionChoice(Body):
    """The function that the answer has to call."""

    type: Literal["function"]
    name: Name

    def value(self) -> dialogue_tools.ToolChoice:
        """As the engine takes it."""
        return dialogue_tools.ToolChoice("named", self.name)


class AllowedTool(Body):
    """One of the functions that the answer may call."""

    type: Literal["function"]
    name: Name


AnAllowedTool = Annotated[AllowedTool, BeforeValidator(_check_is_function, json_schema_input_type=AllowedTool)]


class AllowedTools(Body):
    """The functions that the answer may or has to call; the model is told of all."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[AnAllowedTool], Field(max_length=MAX_TOOLS, fail_fast=True)]

    def value(self) -> dialogue_tools.ToolChoice:
        """As the engine takes it."""
        return dialogue_tools.ToolChoice(self.mode, allowed=tuple(tool.name for tool in self.tools))


_CHOICES: Mapping[str, type[FunctionChoice | AllowedTools]] = {
    "function": FunctionChoice,
    "allowed_tools": AllowedTools,
}


def _as_choice(choice: Any, info: ValidationInfo) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else choice
    kinds: Collection[str] = _CHOICES if isinstance(choice, dict) else ("auto", "none", "required")
    if not isinstance(kind, str) or kind not in kinds:
        supported = '"auto", "none", "required", and objects of type "function" or "allowed_tools"'
        raise unsupported(f"{repr(kind)[:MAX_NAME_CHARS]} is not supported; supported: {supported}")
    return validated_within(_CHOICES[kind], choice, info) if isinstance(choice, dict) else choice


ChoiceWord = Literal["auto", "none", "required"]
ToolChoice = ChoiceWord | FunctionChoice | AllowedTools
AnyToolChoice = Annotated[ToolChoice, BeforeValidator(_as_choice, json_schema_input_type=ToolChoice)]


def choice_value(choice: ToolChoice) -> dialogue_tools.ToolChoice:
    """As the engine takes it."""
    return dialogue_tools.ToolChoice(choice) if isinstance(choice, str) else choice.value()
