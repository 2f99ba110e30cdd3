"""A grammar in llguidance's Lark syntax in the making: named rules, texts with special tokens in them, JSON under schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.dialogue.tools import Tool
from engine.errors import InvalidParameterError
from engine.grammar.json_schema import JSON_WHITESPACE, without_notes
from engine.grammar.lark import escaped, quoted

ANY_TEXT = "/(?s:.)*/"
# Of all schemas that are written into one grammar: each that refers to definitions has all of them.
MAX_SCHEMA_CHARS = 1 << 20
# As templates write JSON: a space behind each comma and colon and nothing else.
AS_TEMPLATES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# As answers in JSON are written.
AS_ANSWERS = {"whitespace_pattern": JSON_WHITESPACE}


@dataclass
class LarkRules:
    """A grammar in the making.

    special_ids: see call_grammar.
    json_options: how JSON is written.
    """

    special_ids: Mapping[str, int]
    json_options: Mapping[str, Any] = field(default_factory=lambda: AS_TEMPLATES)
    lines: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    num_schema_chars: int = 0

    def add(self, name: str, body: str) -> str:
        """A rule; returns its name."""
        self.lines[name] = body
        return name

    def share(self, kind: str, body: str, mark: str = "") -> str:
        """The name of a rule with this body, which is made if there is none yet."""
        name = self.names.get(body)
        if name is None:
            name = self.names[body] = f"{kind}{len(self.names)}"
            self.add(name + mark, body)
        return name

    def lark(self, start: str) -> str:
        return "\n".join((f"start: {start}", *(f"{name}: {body}" for name, body in self.lines.items())))

    def text(self, text: str) -> str:
        """Exactly this text, in which special tokens stand as such."""
        parts: list[str] = []
        while text:
            found = [(text.find(marker), marker) for marker in self.special_ids if marker in text]
            start, marker = min(found, key=lambda place: (place[0], -len(place[1])), default=(len(text), ""))
            if start:
                parts.append(quoted(text[:start]))
            if marker:
                parts.append(f"<[{self.special_ids[marker]}]>")
            text = text[start + len(marker) :]
        return " ".join(parts)

    def until(self, marker: str) -> str:
        """Any text up to a marker, and the marker."""
        if marker in self.special_ids:
            return f"{self.add('any', ANY_TEXT)} {self.text(marker)}"
        return self.share("until", f"{ANY_TEXT} {quoted(marker)}", "[lazy]")

    def without(self, marker: str) -> str:
        """Any text in which a marker does not occur."""
        if marker in self.special_ids:
            return self.add("any", ANY_TEXT)
        return self.add("FREE", f"{ANY_TEXT} & ~/(?s:.)*{escaped(marker)}(?s:.)*/")

    def json(self, schema: Mapping[str, Any], *, strict: bool) -> str:
        """JSON that is valid under a schema.

        strict: what the grammar engine cannot enforce is an error; else it is ignored.
        """
        options = {**self.json_options, "lenient": not strict}
        body = "%json " + json.dumps({**without_notes(schema), "x-guidance": options})
        self.num_schema_chars += len(body)
        if self.num_schema_chars > MAX_SCHEMA_CHARS:
            raise InvalidParameterError(
                "the schemas of the tools are too large for strict tools or a forced call: definitions that parameters refer "
                "to count once for each; shorten them",
                param="tools",
            )
        return self.share("json", body)

    def arguments(self, tool: Tool) -> str:
        """A tool's arguments as a JSON object. Other keys than the schema's are barred unless it allows them."""
        return self.json(_arguments_schema(tool), strict=tool.strict)

    def value(self, tool: Tool, schema: Mapping[str, Any], *, strict: bool) -> str:
        """The value of one parameter as JSON."""
        return self.json({**schema, **_definitions(tool, schema)}, strict=strict)

    def call_object(self, tool: Tool, arguments_key: str) -> str:
        """A call as one JSON object: its name, then its arguments."""
        schema = _arguments_schema(tool)
        return self.json(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, arguments_key: schema},
                "required": ["name", arguments_key],
                "additionalProperties": False,
                **_definitions(tool, schema),
            },
            strict=tool.strict,
        )


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    schema = {"type": "object", **tool.parameters}
    if schema.get("properties") or not tool.parameters:
        schema.setdefault("additionalProperties", False)
    return schema


def _definitions(tool: Tool, schema: Mapping[str, Any]) -> dict[str, Any]:
    """What a part of a tool's schema refers to, by the keys under which it is looked for."""
    if '"$ref"' not in json.dumps(schema):
        return {}
    return {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
