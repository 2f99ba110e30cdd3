"""The functions that a client offers to the model, as every endpoint with tools takes them.

Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from deployments.http.parsing import Body
from engine.dialogue.tools import Tool, ToolChoice
from engine.errors import InvalidParameterError

MAX_CALLS = 128  # of one message
MAX_ID_CHARS = 256
MAX_TOOLS = 128
MAX_TOOLS_CHARS = 1 << 18  # of all definitions as JSON

Name = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]


def _check_parameters(parameters: Any) -> Any:
    """What is not looked into here is for the compiler of grammars to judge."""
    if isinstance(parameters, dict):
        properties, required = parameters.get("properties", {}), parameters.get("required", [])
        if parameters.get("type", "object") != "object":
            raise PydanticCustomError("invalid", "must be the schema of an object", {"param": "type"})
        if not isinstance(properties, dict):
            raise PydanticCustomError("invalid", "must be an object", {"param": "properties"})
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise PydanticCustomError("invalid", "must be a list of names", {"param": "required"})
    return parameters


PARAMETERS_SCHEMA = {  # _check_parameters' rules, for the served document
    "type": "object",
    "properties": {
        "type": {"const": "object"},
        "properties": {"type": "object"},
        "required": {"type": "array", "items": {"type": "string"}},
    },
}
Parameters = Annotated[dict[str, Any], BeforeValidator(_check_parameters), Field(json_schema_extra=PARAMETERS_SCHEMA)]


class Function(Body):
    """A function that the client offers. parameters: the JSON schema of an object."""

    name: FunctionName
    description: str = ""
    parameters: Parameters = Field(default={})
    strict: bool = False

    def value(self) -> Tool:
        """As the engine takes it."""
        return Tool(self.name, self.description, self.parameters, self.strict)


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raises PydanticCustomError, which names the parameter, for tools and a choice that cannot be met together."""
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise PydanticCustomError("invalid", "two tools have the same name", {"param": "tools"})
    if sum(tool.num_chars for tool in tools) > MAX_TOOLS_CHARS:
        message = f"have more than {MAX_TOOLS_CHARS} characters as JSON; shorten them"
        raise PydanticCustomError("invalid", message, {"param": "tools"})
    try:
        choice.check(tools)
    except InvalidParameterError as error:
        raise PydanticCustomError("invalid", error.message, {"param": "tool_choice"}) from None
