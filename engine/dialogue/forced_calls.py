"""Grammars that hold an answer to calls: forced ones, strict ones, one at most, or calls beside an answer of a given form.

The functions return texts in llguidance's Lark syntax and depend on the tools alone; a schema's faults are found when
the text is compiled. Calls have the format of the model's chat template, spaces included, so that history is as it was
generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from engine.dialogue.formats import CallFormat
from engine.dialogue.gemma_calls import CLOSING, OPENING, QUOTE, GemmaCalls
from engine.dialogue.harmony import Harmony
from engine.dialogue.json_calls import BareJson, MarkedJson, NamedJson
from engine.dialogue.lark_rules import ANY_TEXT, AS_ANSWERS, AS_TEMPLATES, LarkRules
from engine.dialogue.python_calls import PythonCalls
from engine.dialogue.reasoning import ReasoningFormat
from engine.dialogue.tagged_calls import TaggedCalls
from engine.dialogue.tools import Tool, ToolChoice, schema_types
from engine.grammar.lark import escaped, quoted

# An answer that is no call in a format in which a call is the whole answer.
NO_CALL_TEXT = r"/([^\[{\s](?s:.)*)?/"
FORM = "@form"


class Beside(Enum):
    """What an answer may have beside calls."""

    NOTHING = "nothing: it has to call"
    ANY_TEXT = "any text around them, or any text alone"
    JSON = "JSON of a given form instead of them"
    FORM = "another text of a given form instead of them"

    @property
    def is_form(self) -> bool:
        return self in (Beside.JSON, Beside.FORM)


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """A grammar for an answer.

    text: in Lark; the rule @form stands for the given form, if there is one.
    begins_behind: a text up to which anything may be said; empty = it holds from the start.
    beginnings: of all that is not of that form, so that no text of it may begin so.
    """

    text: str
    begins_behind: str = ""
    beginnings: tuple[str, ...] = ()


def call_grammar(
    form: CallFormat | None,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    is_parallel: bool = True,
    reasoning: ReasoningFormat | None = None,
    thinking_state: str = "closed",
    special_ids: Mapping[str, int] | None = None,
    beside: Beside = Beside.ANY_TEXT,
) -> CallGrammar | None:
    """What the answer has to match.

    None if it may be anything, or if all of it has to be of the given form.

    Raises InvalidParameterError for a choice that cannot be met.
    form: how the model writes calls; None = in no known way, and none is asked for.
    is_parallel: several calls may be made.
    reasoning, thinking_state: how the model thinks and where its answer begins: see ChatTemplate.thinking_state.
    special_ids: the ids of the special tokens among the markers, by their texts; other markers are written as text.
    beside: what it may be if it is no call; counts only if the call is not forced.
    """
    choice.check(tools)
    offered = () if form is None else choice.offered(tools)
    if choice.is_forced:
        beside = Beside.NOTHING
    is_framed = form is not None and form.frames_answers
    may_think = reasoning is not None and not is_framed and thinking_state == ""
    is_limited = not is_parallel or choice.allowed is not None
    holds_calls = choice.is_forced or any(tool.strict for tool in offered) or (offered and is_limited)
    if not holds_calls and not (beside.is_form and (offered or is_framed or may_think)):
        return None
    is_json = beside is Beside.JSON and isinstance(form, BareJson)
    rules = LarkRules(special_ids or {}, AS_ANSWERS if is_json else AS_TEMPLATES)
    answer = FORM if form is None or not (offered or is_framed) else _calls(form, rules, offered, is_parallel, beside)
    beginnings = list(_beginnings(form, offered))
    begins_behind = ""
    if reasoning is not None and not is_framed and thinking_state == "open":
        begins_behind = reasoning.closing
    elif reasoning is not None and may_think:
        rules.add("gap", r"/[ \n]{0,2}/")
        answer = f"({rules.text(reasoning.opening)} {rules.until(reasoning.closing)} gap)? ({answer})"
        beginnings.append(reasoning.opening.strip())
    return CallGrammar(rules.lark(answer), begins_behind, tuple(beginnings) if beside.is_form else ())


def _beginnings(form: CallFormat | None, tools: Sequence[Tool]) -> Sequence[str]:
    """Texts with one of which each answer begins that begins with a call of these tools."""
    match form:
        case BareJson():
            return [_object_head(tool, form.arguments_key) for tool in tools]
        case PythonCalls() if not form.opening:
            return [f"[{tool.name}(" for tool in tools]
        case NamedJson():
            return [form.section[0] or form.opening]
        case MarkedJson() | TaggedCalls() | PythonCalls() | GemmaCalls():
            return [form.opening]
    return []


def _calls(form: CallFormat, rules: LarkRules, tools: Sequence[Tool], is_parallel: bool, beside: Beside) -> str:
    """The rule of an answer."""
    match form:
        case MarkedJson():
            one = _alternatives([_named_object(rules, tool, "arguments") for tool in tools])
            opening, rest, separator = _marked(form, rules, one, is_parallel)
        case NamedJson() if form.is_list:
            one = _alternatives([_named_object(rules, tool, "arguments") for tool in tools])
            opening, rest, separator = _marked(MarkedJson(form.opening, is_list=True), rules, one, is_parallel)
        case NamedJson():
            opening, rest, separator = _named_calls(form, rules, tools, is_parallel)
        case TaggedCalls():
            opening = form.opening
            one = _alternatives([_tagged(form, rules, tool) for tool in tools])
            rest, separator = one, "\n"
        case PythonCalls():
            one = _alternatives([_python_call(rules, tool) for tool in tools])
            first = f'"[" {one}'
            if beside is Beside.FORM and not form.opening:  # one piece, for a text of the form may begin with a bracket
                first = _alternatives([_python_call(rules, tool, "[") for tool in tools])
            listed = f'{first} (", " {one})* "]"' if is_parallel else f'{first} "]"'
            opening, rest, separator = form.opening, f"{listed} {rules.text(form.closing)}".strip(), None
        case GemmaCalls():
            opening, rest, separator = OPENING, _alternatives([_gemma_call(rules, tool) for tool in tools]), ""
        case BareJson():
            # Beside JSON it is written as such, for the two may begin with the same characters.
            write = LarkRules.call_object if beside is Beside.JSON else _named_object
            one = _alternatives([write(rules, tool, form.arguments_key) for tool in tools])
            if beside is Beside.NOTHING:
                return one
            begins_so = "" if form.opening in rules.special_ids else f" & ~/{escaped(form.opening)}(?s:.)*/"
            other = FORM if beside.is_form else rules.add("FREE", NO_CALL_TEXT + begins_so)
            return f"({rules.text(form.opening)})? {one} | {other}"
        case Harmony():
            return _harmony(rules, tools, beside)
        case _:
            raise TypeError(f"no grammar of {form}")
    if beside is Beside.ANY_TEXT:
        return _free(rules, opening, rest, separator, is_parallel)
    held = rest
    if opening:
        one = rules.add("call", f"{rules.text(opening)} {rest}")
        held = one if separator is None or not is_parallel else f"{one} ({rules.text(separator)} {one})*"
    return f"{held} | {FORM}" if beside.is_form else held


def _alternatives(rules: Sequence[str]) -> str:
    return "(" + " | ".join(rules) + ")"


def _free(rules: LarkRules, opening: str, rest: str, separator: str | None, is_parallel: bool) -> str:
    """Text in which calls may begin with `opening` and go on with `rest`.

    separator: between two of them; None = the text begins them once at most.
    is_parallel: text may follow them, and further calls; else the first one ends the answer.
    """
    if not opening:
        # The whole answer is the call. What begins otherwise is free, what begins so is held to it.
        return f"{rest} | {rules.add('FREE', NO_CALL_TEXT)}"
    free = rules.without(opening)
    called = rules.add("called", f"{rules.until(opening)} {rest}")
    if not is_parallel:
        return f"{called} | {free}"
    return f"{called}? {free}" if separator is None else f"{called}* {free}"


def _object_head(tool: Tool, key: str) -> str:
    return f'{{"name": {quoted(tool.name)}, "{key}": '


def _named_object(rules: LarkRules, tool: Tool, key: str) -> str:
    return f'{rules.text(_object_head(tool, key))} {rules.arguments(tool)} "}}"'


def _marked(form: MarkedJson, rules: LarkRules, one: str, is_parallel: bool) -> tuple[str, str, str | None]:
    """(opening, the rest of a call, separator)."""
    if form.is_list:
        more = f'(", " {one})*' if is_parallel else ""
        return form.opening, f'"[" {one} {more} "]" {rules.text(form.closing)}'.strip(), None
    return form.opening, f"{quoted(chr(10))} {one} {rules.text(chr(10) + form.closing)}", "\n"


def _named_calls(
    form: NamedJson, rules: LarkRules, tools: Sequence[Tool], is_parallel: bool
) -> tuple[str, str, str | None]:
    """(opening, the rest of all calls, no separator)."""
    bodies: list[str] = []
    for tool in tools:
        head, _, behind = form.head_text.replace("{name}", tool.name).partition("{index}")
        index = f"{rules.add('index', '/[0-9]{1,4}/')} {rules.text(behind)}" if behind else ""
        bodies.append(f"{rules.text(head)} {index} {rules.arguments(tool)} {rules.text(form.tail + form.closing)}")
    body = _alternatives(bodies)
    more = f"({rules.text(form.separator + form.opening)} {body})*" if is_parallel else ""
    begin, end = form.section
    if begin:
        return begin, f"{rules.text(form.opening)} {body} {more} {rules.text(end)}", None
    return form.opening, f"{body} {more}", None


def _tagged(form: TaggedCalls, rules: LarkRules, tool: Tool) -> str:
    """A call from behind its opening on."""
    line = form.line
    parts = [rules.text((line if form.name[0] else "") + form.name[0] + tool.name + form.name[1] + line)]
    for name, schema, is_required in _parameters(tool):
        head = form.key[0] + name + form.key[1] + (line if form.value[0] else "") + form.value[0] + form.pad
        body = f"{rules.text(head)} {_tagged_value(form, rules, tool, schema)} {rules.text(line)}"
        parts.append(body if is_required else f"({body})?")
    parts.append(rules.text((form.end + line if form.end else "") + form.closing))
    return " ".join(parts)


def _tagged_value(form: TaggedCalls, rules: LarkRules, tool: Tool, schema: Mapping[str, Any]) -> str:
    """A value and what ends it: text as it is if it may be a string, else JSON."""
    types = schema_types(schema, tool.parameters)
    values = schema.get("enum")
    end = rules.text(form.pad + form.value[1])
    if isinstance(values, Sequence) and values and all(isinstance(value, str) for value in values):
        return f"{_alternatives([quoted(value) for value in values])} {end}"
    if not types or "string" in types:
        return rules.until(form.value[1])
    return f"{rules.value(tool, schema, strict=tool.strict)} {end}"


def _python_call(rules: LarkRules, tool: Tool, before: str = "") -> str:
    """f(a="x", b=1). before: stands in front of it."""
    parts = [
        (f"{quoted(name + '=')} {rules.value(tool, schema, strict=tool.strict)}", is_required)
        for name, schema, is_required in _parameters(tool)
    ]
    return f'{quoted(f"{before}{tool.name}(")} {_listed(rules, parts, ", ")} ")"'


def _gemma_call(rules: LarkRules, tool: Tool) -> str:
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
        parts.append((f"{quoted(name + ':')} {value}", is_required))
    head = f"call:{tool.name}{{"
    return f"{quoted(head)} {_listed(rules, parts, ',')} {rules.text('}' + CLOSING)}"


def _parameters(tool: Tool) -> list[tuple[str, Mapping[str, Any], bool]]:
    """(name, schema, whether it is required) of each parameter, in the schema's order."""
    required = tool.parameters.get("required") or ()
    properties: Mapping[str, Any] = tool.parameters.get("properties") or {}
    return [
        (name, schema if isinstance(schema, Mapping) else {}, name in required) for name, schema in properties.items()
    ]


def _listed(rules: LarkRules, parts: Sequence[tuple[str, bool]], separator: str) -> str:
    """The rule of a list of parts in this order, with a separator between.

    parts: (rule, whether it is required).
    """
    # For what may follow each part there are two rules: with a separator before it, and without.
    later = first = '""'
    for one, is_required in reversed(parts):
        next_later, next_first = later, first
        later = rules.share(
            "later", f"{quoted(separator)} {one} {next_later}" + ("" if is_required else f" | {next_later}")
        )
        first = rules.share("first", f"{one} {next_later}" + ("" if is_required else f" | {next_first}"))
    return first


def _harmony(rules: LarkRules, tools: Sequence[Tool], beside: Beside) -> str:
    """Analysis as the model likes, then one call, or what may stand beside."""
    calls = [
        rules.text(f"<|channel|>commentary to=functions.{tool.name} <|constrain|>json<|message|>")
        + f" {rules.arguments(tool)}"
        for tool in tools
    ]
    between = rules.text("<|start|>assistant")
    thought = f"{rules.text('<|channel|>analysis<|message|>')} {rules.until('<|end|>')} {between}"
    if beside is Beside.NOTHING:
        return f"({thought})? {_alternatives(calls)}"
    said = f"{rules.text('<|channel|>commentary<|message|>')} {rules.until('<|end|>')} {between}"
    before = f"({thought})*" if beside.is_form else f"({thought} | {said})*"
    last = FORM if beside.is_form else rules.add("any", ANY_TEXT)
    return f"{before} {_alternatives([*calls, rules.text('<|channel|>final<|message|>') + f' {last}'])}"
