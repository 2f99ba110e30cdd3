"""Tools that a model may call, and which of them a request asks for. Plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import InvalidParameterError


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the client offers.

    parameters: JSON Schema of an object; empty = any object.
    strict: calls have to match the schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    @property
    def num_chars(self) -> int:
        """The length of its definition, about."""
        return len(json.dumps(self.definition()))

    def with_any_values(self) -> Tool:
        """The same tool, with parameters of the same names whose values may be anything."""
        kept = {key: self.parameters[key] for key in ("required", "additionalProperties") if key in self.parameters}
        if not isinstance(kept.get("additionalProperties", False), bool):
            kept["additionalProperties"] = True
        names = self.parameters.get("properties") or {}
        parameters = {**kept, "properties": {name: {} for name in names}} if self.parameters else {}
        return replace(self, parameters=parameters)

    def definition(self) -> dict[str, Any]:
        """As chat templates read it; some fail without a description."""
        parameters = dict(self.parameters) or {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the answer has to call something.

    mode: "auto" (as the model likes), "none", "required" (at least one call) or "named" (one call of `name`).
    allowed: the names of the tools that may be called, of all that the model is told of; None = all may.
    """

    mode: str = "auto"
    name: str = ""
    allowed: tuple[str, ...] | None = None

    @property
    def is_forced(self) -> bool:
        return self.mode in ("required", "named")

    def check(self, tools: Sequence[Tool]) -> None:
        """Raises InvalidParameterError if the choice cannot be met with these tools."""
        if self.mode not in ("auto", "none", "required", "named"):
            raise InvalidParameterError(
                f"tool_choice must be auto, none, required or named, got {self.mode!r}", param="tool_choice"
            )
        if self.is_forced and not tools:
            raise InvalidParameterError("tool_choice asks for a call, but there are no tools", param="tool_choice")
        if self.mode == "named" and self.name not in {tool.name for tool in tools}:
            raise InvalidParameterError(
                f"tool_choice names {self.name!r}, but no tool has that name", param="tool_choice"
            )
        for name in self.allowed or ():
            if name not in {tool.name for tool in tools}:
                raise InvalidParameterError(
                    f"tool_choice allows {name!r}, but no tool has that name", param="tool_choice"
                )
        if self.is_forced and not self.offered(tools):
            raise InvalidParameterError("tool_choice asks for a call, but allows none", param="tool_choice")

    def offered(self, tools: Sequence[Tool]) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        if self.mode == "none":
            return ()
        names = (self.name,) if self.mode == "named" else self.allowed
        return tuple(tool for tool in tools if names is None or tool.name in names)


AS_THE_MODEL_LIKES = ToolChoice()

# Parts of a schema that are looked at for its types: references can lead to one part in any number of ways, or in circles.
MAX_PARTS = 64
# Names of JSON Schema's types for Python's values.
TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def parameter_schema(tool: Tool, name: str) -> Mapping[str, Any] | None:
    """The schema of one parameter; None if the tool has no such parameter."""
    properties = tool.parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    return schema if isinstance(schema, Mapping) else None


def schema_types(schema: Mapping[str, Any], root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema allows; empty if it does not say.

    root: the whole schema, into which local references point.
    """
    found: set[str] = set()
    waiting: list[Any] = [schema]
    for _ in range(MAX_PARTS):
        if not waiting:
            return frozenset(found)
        part = waiting.pop()
        types, parts = _stated_types(part, root) if isinstance(part, Mapping) else (frozenset(), [])
        if not types and not parts:
            break
        found |= types
        waiting += parts
    return frozenset()


def _stated_types(schema: Mapping[str, Any], root: Mapping[str, Any]) -> tuple[frozenset[str], list[Any]]:
    """(the types that a schema says itself, else the schemas that it refers to for them)."""
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for name in reference[2:].split("/"):
            target = target.get(name) if isinstance(target, Mapping) else None
        return frozenset(), [target]
    stated = schema.get("type")
    if isinstance(stated, str):
        return frozenset([stated]), []
    if isinstance(stated, Sequence):
        return frozenset(name for name in stated if isinstance(name, str)), []
    values = schema["enum"] if isinstance(schema.get("enum"), Sequence) else []
    if values or "const" in schema:
        kinds = (type(value) for value in values or [schema["const"]])
        return frozenset("null" if kind is type(None) else TYPE_NAMES.get(kind, "") for kind in kinds), []
    unions = [schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), Sequence)]
    return frozenset(), [part for union in unions for part in union]


# What templates write for these values with Jinja's `string` filter.
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def value_text(text: str, types: frozenset[str]) -> str:
    """The JSON text of a parameter's value that the model wrote without quotation marks.

    types: what its schema allows; empty = anything. What is of none of these types stays a string.
    """
    if types != {"string"}:
        candidate = PYTHON_WORDS.get(text.strip(), text.strip())
        try:
            kinds = _kinds(json.loads(candidate, parse_constant=_refuse))
        except (ValueError, RecursionError):
            kinds = frozenset(["string"])
        if "string" not in kinds and (not types or kinds & types):
            return candidate
    return json.dumps(text, ensure_ascii=False)


def _kinds(value: Any) -> frozenset[str]:
    """The JSON types that a value is of."""
    if value is None:
        return frozenset(["null"])
    kind = TYPE_NAMES[type(value)]
    is_integer = kind == "integer" or (kind == "number" and value.is_integer())
    return frozenset(["integer", "number"] if is_integer else [kind])


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
