"""Grammars that hold an answer to calls: for a tool_choice that asks for one, and for strict tools.

The functions return texts in llguidance's Lark syntax and depend on the tools alone; a schema's faults are found when
the text is compiled. Calls have the format of the model's chat template, spaces included, so that history is as it was
generated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.dialogue.formats import CallFormat
from engine.dialogue.gemma_calls import CLOSING, OPENING, QUOTE, GemmaCalls
from engine.dialogue.harmony import Harmony
from engine.dialogue.json_calls import BareJson, MarkedJson, NamedJson
from engine.dialogue.python_calls import PythonCalls
from engine.dialogue.reasoning import ReasoningFormat
from engine.dialogue.tagged_calls import TaggedCalls
from engine.dialogue.tools import Tool, ToolChoice, schema_types
from engine.errors import InvalidParameterError
from engine.grammar.json_schema import without_notes

ANY_TEXT = "/(?s:.)*/"
# An answer that is no call in a format in which a call is the whole answer.
NO_CALL_TEXT = r"/([^\[{\s](?s:.)*)?/"
# Of all schemas that are written into one grammar: each that refers to definitions has all of them.
MAX_SCHEMA_CHARS = 1 << 20
# As templates write JSON: a space behind each comma and colon and nothing else.
AS_TEMPLATES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """A grammar for an answer.

    text: in Lark. begins_behind: a text up to which anything may be said; empty = it holds from the start.
    """

    text: str
    begins_behind: str = ""


def call_grammar(
    form: CallFormat,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    is_parallel: bool = True,
    reasoning: ReasoningFormat | None = None,
    thinking_state: str = "closed",
    special_ids: Mapping[str, int] | None = None,
) -> CallGrammar | None:
    """What the answer has to match; None if it may be anything.

    Raises InvalidParameterError for a choice that cannot be met.
    form: how the model writes calls.
    is_parallel: several calls may be made.
    reasoning, thinking_state: how the model thinks and where its answer begins: see ChatTemplate.thinking_state.
    special_ids: the ids of the special tokens among the markers, by their texts; other markers are written as text.
    """
    choice.check(tools)
    offered = choice.offered(tools)
    if not choice.is_forced and not any(tool.strict for tool in offered):
        return None
    rules = _Rules(special_ids or {})
    calls = _calls(form, rules, offered, is_parallel, is_free=not choice.is_forced)
    begins_behind = ""
    if reasoning is not None and not form.frames_answers and thinking_state != "closed":
        if thinking_state == "open":
            begins_behind = reasoning.closing
        else:
            rules.add("gap", r"/[ \n]{0,2}/")
            thought = f"{rules.text(reasoning.opening)} {rules.until(reasoning.closing)} gap"
            calls = f"({thought})? {calls}"
    return CallGrammar(rules.lark(calls), begins_behind)


@dataclass
class _Rules:
    """A grammar in the making.

    special_ids: see call_grammar.
    """

    special_ids: Mapping[str, int]
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
                parts.append(_quote(text[:start]))
            if marker:
                parts.append(f"<[{self.special_ids[marker]}]>")
            text = text[start + len(marker) :]
        return " ".join(parts)

    def until(self, marker: str) -> str:
        """Any text up to a marker, and the marker."""
        if marker in self.special_ids:
            return f"{self.add('any', ANY_TEXT)} {self.text(marker)}"
        return self.share("until", f"{ANY_TEXT} {_quote(marker)}", "[lazy]")

    def without(self, marker: str) -> str:
        """Any text in which a marker does not occur."""
        if marker in self.special_ids:
            return self.add("any", ANY_TEXT)
        return self.add("FREE", f"{ANY_TEXT} & ~/(?s:.)*{_escape(marker)}(?s:.)*/")

    def json(self, schema: Mapping[str, Any], *, strict: bool) -> str:
        """JSON that is valid under a schema.

        strict: what the grammar engine cannot enforce is an error; else it is ignored.
        """
        options = {**AS_TEMPLATES, "lenient": not strict}
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
        schema = {"type": "object", **tool.parameters}
        if schema.get("properties") or not tool.parameters:
            schema.setdefault("additionalProperties", False)
        return self.json(schema, strict=tool.strict)

    def value(self, tool: Tool, schema: Mapping[str, Any], *, strict: bool) -> str:
        """The value of one parameter as JSON."""
        shared = {}
        if '"$ref"' in json.dumps(schema):
            shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
        return self.json({**schema, **shared}, strict=strict)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escape(text: str) -> str:
    """For use within a regular expression."""
    return "".join(f"\\{char}" if char in r"\.[]{}()*+?|^$/" else char for char in text)


def _calls(form: CallFormat, rules: _Rules, tools: Sequence[Tool], is_parallel: bool, *, is_free: bool) -> str:
    """The rule of the calls of an answer.

    is_free: text may stand before and behind them, and there may be none.
    """
    match form:
        case MarkedJson():
            one = _alternatives([_named_object(rules, tool, "arguments") for tool in tools])
            opening, rest, separator = _marked(form, rules, one, is_parallel)
        case NamedJson() if form.is_list:
            one = _alternatives([_named_object(rules, tool, "arguments") for tool in tools])
            opening, rest, separator = _marked(MarkedJson(form.opening, is_list=True), rules, one, is_parallel)
        case NamedJson():
            return _named_calls(form, rules, tools, is_parallel, is_free)
        case TaggedCalls():
            opening = form.opening
            one = _alternatives([_tagged(form, rules, tool) for tool in tools])
            rest, separator = one, "\n"
        case PythonCalls():
            one = _alternatives([_python_call(rules, tool) for tool in tools])
            listed = f'"[" {one} (", " {one})* "]"' if is_parallel else f'"[" {one} "]"'
            opening, rest, separator = form.opening, f"{listed} {rules.text(form.closing)}".strip(), None
        case GemmaCalls():
            opening, rest, separator = OPENING, _alternatives([_gemma_call(rules, tool) for tool in tools]), ""
        case BareJson():
            one = _alternatives([_named_object(rules, tool, form.arguments_key) for tool in tools])
            if not is_free:
                return one
            begins_so = "" if form.opening in rules.special_ids else f" & ~/{_escape(form.opening)}(?s:.)*/"
            return f"({rules.text(form.opening)})? {one} | {rules.add('FREE', NO_CALL_TEXT + begins_so)}"
        case Harmony():
            return _harmony(rules, tools, is_free)
        case _:
            raise TypeError(f"no grammar of {form}")
    return _framed(rules, opening, rest, separator if is_parallel else None, is_free)


def _alternatives(rules: Sequence[str]) -> str:
    return "(" + " | ".join(rules) + ")"


def _framed(rules: _Rules, opening: str, rest: str, separator: str | None, is_free: bool) -> str:
    """Calls that begin with `opening` and go on with `rest`.

    separator: between two of them; None = there is one at most.
    """
    if not opening:
        # The whole answer is the call. What begins otherwise is free, what begins so is held to it.
        return f"{rest} | {rules.add('FREE', NO_CALL_TEXT)}" if is_free else rest
    if not is_free:
        one = rules.add("call", f"{rules.text(opening)} {rest}")
        return one if separator is None else f"{one} ({rules.text(separator)} {one})*"
    free = rules.without(opening)
    called = rules.add("called", f"{rules.until(opening)} {rest}")
    return f"{called}* {free}" if separator is not None else f"{called}? {free}"


def _named_object(rules: _Rules, tool: Tool, key: str) -> str:
    head = rules.text('{"name": ' + _quote(tool.name) + f', "{key}": ')
    return f'{head} {rules.arguments(tool)} "}}"'


def _marked(form: MarkedJson, rules: _Rules, one: str, is_parallel: bool) -> tuple[str, str, str | None]:
    """(opening, the rest of a call, separator)."""
    if form.is_list:
        more = f'(", " {one})*' if is_parallel else ""
        return form.opening, f'"[" {one} {more} "]" {rules.text(form.closing)}'.strip(), None
    return form.opening, f"{_quote(chr(10))} {one} {rules.text(chr(10) + form.closing)}", "\n"


def _named_calls(form: NamedJson, rules: _Rules, tools: Sequence[Tool], is_parallel: bool, is_free: bool) -> str:
    bodies: list[str] = []
    for tool in tools:
        head, _, behind = form.head_text.replace("{name}", tool.name).partition("{index}")
        index = f"{rules.add('index', '/[0-9]{1,4}/')} {rules.text(behind)}" if behind else ""
        bodies.append(f"{rules.text(head)} {index} {rules.arguments(tool)} {rules.text(form.tail + form.closing)}")
    body = _alternatives(bodies)
    more = f"({rules.text(form.separator + form.opening)} {body})*" if is_parallel else ""
    begin, end = form.section
    if begin:
        return _framed(rules, begin, f"{rules.text(form.opening)} {body} {more} {rules.text(end)}", None, is_free)
    return _framed(rules, form.opening, f"{body} {more}", None, is_free)


def _tagged(form: TaggedCalls, rules: _Rules, tool: Tool) -> str:
    """A call from behind its opening on."""
    line = form.line
    parts = [rules.text((line if form.name[0] else "") + form.name[0] + tool.name + form.name[1] + line)]
    for name, schema, is_required in _parameters(tool):
        head = form.key[0] + name + form.key[1] + (line if form.value[0] else "") + form.value[0] + form.pad
        body = f"{rules.text(head)} {_tagged_value(form, rules, tool, schema)} {rules.text(line)}"
        parts.append(body if is_required else f"({body})?")
    parts.append(rules.text((form.end + line if form.end else "") + form.closing))
    return " ".join(parts)


def _tagged_value(form: TaggedCalls, rules: _Rules, tool: Tool, schema: Mapping[str, Any]) -> str:
    """A value and what ends it: text as it is if it may be a string, else JSON."""
    types = schema_types(schema, tool.parameters)
    values = schema.get("enum")
    end = rules.text(form.pad + form.value[1])
    if isinstance(values, Sequence) and values and all(isinstance(value, str) for value in values):
        return f"{_alternatives([_quote(value) for value in values])} {end}"
    if not types or "string" in types:
        return rules.until(form.value[1])
    return f"{rules.value(tool, schema, strict=tool.strict)} {end}"


def _python_call(rules: _Rules, tool: Tool) -> str:
    """f(a="x", b=1)."""
    parts = [
        (f"{_quote(name + '=')} {rules.value(tool, schema, strict=tool.strict)}", is_required)
        for name, schema, is_required in _parameters(tool)
    ]
    return f'{_quote(tool.name + "(")} {_listed(rules, parts, ", ")} ")"'


def _gemma_call(rules: _Rules, tool: Tool) -> str:
    """A call from behind its opening on: call:f{a:<|"|>x<|"|>,b:1} and the closing."""
    parts: list[tuple[str, bool]] = []
    for name, schema, is_required in _parameters(tool):
        values = schema.get("enum")
        if isinstance(values, Sequence) and values and all(isinstance(value, str) for value in values):
            value = _alternatives([rules.text(f"{QUOTE}{value}{QUOTE}") for value in values])
        elif schema_types(schema, tool.parameters) == {"string"}:
            value = f"{rules.text(QUOTE)} {rules.until(QUOTE)}"
        else:
            value = rules.value(tool, schema, strict=tool.strict)
        parts.append((f"{_quote(name + ':')} {value}", is_required))
    head = f"call:{tool.name}{{"
    return f"{_quote(head)} {_listed(rules, parts, ',')} {rules.text('}' + CLOSING)}"


def _parameters(tool: Tool) -> list[tuple[str, Mapping[str, Any], bool]]:
    """(name, schema, whether it is required) of each parameter, in the schema's order."""
    required = tool.parameters.get("required") or ()
    properties: Mapping[str, Any] = tool.parameters.get("properties") or {}
    return [
        (name, schema if isinstance(schema, Mapping) else {}, name in required) for name, schema in properties.items()
    ]


def _listed(rules: _Rules, parts: Sequence[tuple[str, bool]], separator: str) -> str:
    """The rule of a list of parts in this order, with a separator between.

    parts: (rule, whether it is required).
    """
    # For what may follow each part there are two rules: with a separator before it, and without.
    later = first = '""'
    for one, is_required in reversed(parts):
        next_later, next_first = later, first
        later = rules.share(
            "later", f"{_quote(separator)} {one} {next_later}" + ("" if is_required else f" | {next_later}")
        )
        first = rules.share("first", f"{one} {next_later}" + ("" if is_required else f" | {next_first}"))
    return first


def _harmony(rules: _Rules, tools: Sequence[Tool], is_free: bool) -> str:
    """Analysis as the model likes, then one call."""
    one = _alternatives(
        [
            rules.text(f"<|channel|>commentary to=functions.{tool.name} <|constrain|>json<|message|>")
            + f" {rules.arguments(tool)}"
            for tool in tools
        ]
    )
    between = rules.text("<|start|>assistant")
    thought = f"{rules.text('<|channel|>analysis<|message|>')} {rules.until('<|end|>')} {between}"
    if not is_free:
        return f"({thought})? {one}"
    said = f"{rules.text('<|channel|>commentary<|message|>')} {rules.until('<|end|>')} {between}"
    final = f"{rules.text('<|channel|>final<|message|>')} {rules.add('any', ANY_TEXT)}"
    return f"({thought} | {said})* ({one} | {final})"
