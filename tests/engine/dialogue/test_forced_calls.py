"""Grammars of calls: whatever a model says under one is read as exactly the calls that were asked for."""

import json
import random
import re
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from engine.core.grammar import GrammarSpec
from engine.dialogue.events import CallStart, Text, parse_answer
from engine.dialogue.forced_calls import Beside, call_grammar
from engine.dialogue.formats import CALL_FORMATS, AnswerFormat, AnswerParser
from engine.dialogue.reasoning import THINK
from engine.dialogue.tools import Tool, ToolChoice
from engine.embedded_model import embedded_model_path
from engine.errors import InvalidParameterError
from engine.grammar.guidance import GuidanceCompiler, _lark
from engine.grammar.interface import Vocabulary
from engine.text.tokenizer import Tokenizer
from tests.engine.dialogue.walks import Walker

WEATHER = Tool(
    "a_b",
    parameters={
        "type": "object",
        "properties": {
            "c": {"type": "string", "maxLength": 6},
            "u": {"enum": ["ab", "cd"]},
            "n": {"type": "integer", "minimum": 0, "maximum": 99},
            "o": {"type": "object", "properties": {"b": {"type": "boolean"}}, "additionalProperties": False},
        },
        "required": ["c", "n"],
    },
)
PING = Tool("ping")
TOOLS = (WEATHER, PING)
STRICT = (Tool(WEATHER.name, parameters=WEATHER.parameters, strict=True), PING)
# (form, whether its markers are special tokens); harmony's always are, as its thinking would end anywhere else.
FORMS = [
    pytest.param(form, are_special, id=f"{name}{index}-{'special' if are_special else 'texts'}")
    for name, forms in CALL_FORMATS.items()
    for index, form in enumerate(forms)
    for are_special in ((True,) if form.frames_answers else (True, False))
]
NUM_WALKS = 8


@cache
def walker_of(form, *, are_special):
    return Walker((*form.markers, *THINK.markers), are_special=are_special)


def check_calls(calls):
    """Each is complete, and its arguments are those of its tool."""
    for call in calls:
        assert call.is_complete
        arguments = json.loads(call.arguments)
        if call.name == "ping":
            assert arguments == {}
        else:
            assert call.name == "a_b"
            assert {"c", "n"} <= set(arguments) <= {"c", "u", "n", "o"}
            assert isinstance(arguments["c"], str)
            assert 0 <= arguments["n"] <= 99
            assert arguments.get("u", "ab") in ("ab", "cd")
            assert isinstance(arguments.get("o", {}).get("b", True), bool)


@pytest.mark.parametrize(("form", "are_special"), FORMS)
def test_a_forced_answer_is_the_calls_that_were_asked_for(form, are_special):
    rng = random.Random(1)
    walker = walker_of(form, are_special=are_special)
    num_complete, numbers = 0, set()
    for choice in (ToolChoice("required"), ToolChoice("named", "a_b")):
        for is_parallel in (True, False):
            grammar = call_grammar(form, TOOLS, choice, is_parallel=is_parallel, special_ids=walker.special_ids)
            for _ in range(NUM_WALKS):
                answer = walker.walk(grammar.text, rng)
                if answer is None:
                    continue
                parsed = parse_answer(form.parser(TOOLS), answer)
                assert parsed.content == "", (answer, parsed)
                assert parsed.calls
                assert is_parallel or len(parsed.calls) == 1, answer
                check_calls(parsed.calls)
                if choice.mode == "named":
                    assert {call.name for call in parsed.calls} == {"a_b"}
                num_complete += 1
                numbers.add(len(parsed.calls))
    assert num_complete >= NUM_WALKS
    assert 1 in numbers


@pytest.mark.parametrize(("form", "are_special"), FORMS)
def test_strict_tools_leave_the_model_free_until_it_calls(form, are_special):
    rng = random.Random(2)
    walker = walker_of(form, are_special=are_special)
    grammar = call_grammar(form, STRICT, ToolChoice(), special_ids=walker.special_ids)
    section = getattr(form, "section", ("",))[0]
    begins = (section or form.opening,) if form.signature and not form.frames_answers else ()
    num_calls, num_free = 0, 0
    for _ in range(8 * NUM_WALKS):
        answer = walker.walk(grammar.text, rng, max_tokens=300)
        if answer is not None:
            parsed = parse_answer(form.parser(STRICT), answer)
            check_calls(parsed.calls)
            # What begins a call has to be one: none of it is left as text.
            assert not any(mark and mark in parsed.content for mark in begins)
            num_calls += len(parsed.calls)
            num_free += not parsed.calls
    assert num_free
    assert num_calls


@pytest.mark.parametrize(("form", "are_special"), FORMS)
def test_at_most_one_call_ends_the_answer(form, are_special):
    """What stands before it is free, and nothing follows it."""
    rng = random.Random(4)
    walker = walker_of(form, are_special=are_special)
    grammar = call_grammar(form, TOOLS, ToolChoice(), is_parallel=False, special_ids=walker.special_ids)
    numbers = []
    for _ in range(400):
        if len(numbers) >= 2 * NUM_WALKS and set(numbers) == {0, 1}:
            break
        answer = walker.walk(grammar.text, rng, max_tokens=300)
        if answer is not None:
            parser = form.parser(TOOLS)
            events = [*parser.feed(answer), *parser.finish()]
            parsed = parse_answer(form.parser(TOOLS), answer)
            check_calls(parsed.calls)
            last_text = max((place for place, event in enumerate(events) if isinstance(event, Text)), default=-1)
            assert all(place > last_text for place, event in enumerate(events) if isinstance(event, CallStart)), answer
            numbers.append(len(parsed.calls))
    assert set(numbers) == {0, 1}


FORM_SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a_b", "b"]}, "n": {"enum": [1, "<tool_call>"]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
JSON_FORM = GrammarSpec.json_schema(FORM_SCHEMA)
LIST_FORM = GrammarSpec.json_schema({"type": "array", "items": {"enum": [False, "a"]}, "minItems": 1, "maxItems": 2})
TEXT_FORM = GrammarSpec("regex", r"[\[{<]{1,3}c?")


@pytest.mark.parametrize("asked", [JSON_FORM, LIST_FORM, TEXT_FORM], ids=["object", "list", "text"])
@pytest.mark.parametrize(("form", "are_special"), FORMS)
def test_beside_a_form_an_answer_is_calls_or_of_that_form(form, are_special, asked):
    rng = random.Random(5)
    walker = walker_of(form, are_special=are_special)
    beside = Beside.JSON if asked.is_json else Beside.FORM
    for is_parallel in (True, False):
        kinds = []
        grammar = call_grammar(
            form, TOOLS, ToolChoice(), is_parallel=is_parallel, special_ids=walker.special_ids, beside=beside
        )
        body = _lark(asked if asked.is_json else replace(asked, never_begins=grammar.beginnings))
        for _ in range(400):
            if len(kinds) >= NUM_WALKS and set(kinds) == {False, True}:
                break
            answer = walker.walk(grammar.text, rng, form=body)
            if answer is None:
                continue
            parsed = parse_answer(AnswerFormat(form, calls_first=True).parser(TOOLS), answer)
            kinds.append(bool(parsed.calls))
            if parsed.calls:
                assert parsed.content == "", answer
                assert is_parallel or len(parsed.calls) == 1
                check_calls(parsed.calls)
            elif asked.is_json:
                Draft202012Validator(json.loads(asked.text)).validate(json.loads(parsed.content))
            else:
                assert re.fullmatch(asked.text, parsed.content)
        assert set(kinds) == {False, True}


def test_a_form_holds_alone_if_nothing_can_be_called():
    form = CALL_FORMATS["hermes"][0]
    assert call_grammar(form, TOOLS, ToolChoice("none"), beside=Beside.JSON) is None
    assert call_grammar(form, (), ToolChoice(), beside=Beside.JSON) is None
    forced = call_grammar(form, TOOLS, ToolChoice("required"), beside=Beside.JSON)
    assert forced == call_grammar(form, TOOLS, ToolChoice("required"))


def test_thinking_may_come_before_a_form_and_before_calls():
    rng = random.Random(6)
    form = CALL_FORMATS["hermes"][0]
    walker = walker_of(form, are_special=False)
    for tools in (TOOLS, ()):
        grammar = call_grammar(form, tools, ToolChoice(), reasoning=THINK, thinking_state="", beside=Beside.JSON)
        seen = set()
        for _ in range(8 * NUM_WALKS):
            answer = walker.walk(grammar.text, rng, form=_lark(JSON_FORM))
            if answer is not None:
                parsed = parse_answer(AnswerFormat(form, THINK, "", calls_first=True).parser(tools), answer)
                assert bool(parsed.calls) != bool(parsed.content)
                seen.add((bool(parsed.reasoning), bool(parsed.calls)))
        assert seen == {(thinks, calls) for thinks in (True, False) for calls in (True, False) if tools or not calls}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_the_tools_that_are_allowed_are_called(mode):
    rng = random.Random(6)
    form = CALL_FORMATS["hermes"][0]
    walker = walker_of(form, are_special=True)
    choice = ToolChoice(mode, allowed=("ping",))
    grammar = call_grammar(form, TOOLS, choice, special_ids=walker.special_ids)
    parsed = [
        parse_answer(form.parser(TOOLS), answer)
        for _ in range(4 * NUM_WALKS)
        if (answer := walker.walk(grammar.text, rng, max_tokens=300)) is not None
    ]
    calls = [call.name for answer in parsed for call in answer.calls]
    assert calls
    assert set(calls) == {"ping"}
    assert mode == "required" or not all(answer.calls for answer in parsed)


def test_without_strict_tools_an_answer_is_free():
    form = CALL_FORMATS["hermes"][0]
    assert call_grammar(form, TOOLS, ToolChoice()) is None
    assert call_grammar(form, STRICT, ToolChoice("none")) is None
    assert call_grammar(form, STRICT, ToolChoice()) is not None


@pytest.mark.parametrize(
    "choice",
    [
        ToolChoice("named", "other"),
        ToolChoice("any"),
        ToolChoice("auto", allowed=("other",)),
        ToolChoice("required", allowed=()),
    ],
)
def test_an_impossible_choice_is_named(choice):
    with pytest.raises(InvalidParameterError, match="tool_choice"):
        call_grammar(CALL_FORMATS["hermes"][0], TOOLS, choice)


def test_a_choice_that_needs_tools_is_refused_without():
    with pytest.raises(InvalidParameterError, match="no tools"):
        call_grammar(CALL_FORMATS["hermes"][0], (), ToolChoice("required"))


@pytest.mark.parametrize("are_special", [False, True], ids=["texts", "special"])
def test_a_model_that_may_think_may_think_before_a_forced_call(are_special):
    form = CALL_FORMATS["hermes"][0]
    rng = random.Random(3)
    walker = walker_of(form, are_special=are_special)
    grammar = call_grammar(
        form, TOOLS, ToolChoice("required"), reasoning=THINK, thinking_state="", special_ids=walker.special_ids
    )
    assert grammar.begins_behind == ""
    thoughts = set()
    for _ in range(4 * NUM_WALKS):
        answer = walker.walk(grammar.text, rng)
        if answer is not None:
            parsed = parse_answer(AnswerParser(THINK.parser(""), form.parser(TOOLS)), answer)
            assert parsed.calls
            assert parsed.content == ""
            check_calls(parsed.calls)
            thoughts.add(bool(parsed.reasoning))
    assert thoughts == {False, True}


def test_a_grammar_begins_behind_thinking_that_the_prompt_opened():
    form = CALL_FORMATS["hermes"][0]
    forced = {
        state: call_grammar(form, TOOLS, ToolChoice("required"), reasoning=THINK, thinking_state=state)
        for state in ("open", "closed")
    }
    assert forced["open"].begins_behind == "</think>"
    assert forced["closed"].begins_behind == ""
    assert forced["open"].text == forced["closed"].text


def test_what_a_schema_says_to_readers_is_not_in_the_grammar():
    inner = {"type": "string", "description": "A note.", "enum": ["description"]}
    parameters = {
        "type": "object",
        "title": "A note.",
        "properties": {"description": inner, "list": {"type": "array", "items": inner}, "any": {"anyOf": [inner]}},
        "required": ["description"],
    }
    tool = Tool("f", parameters=parameters)
    text = call_grammar(CALL_FORMATS["hermes"][0], [tool], ToolChoice("required")).text
    assert "A note." not in text
    walker = Walker((), are_special=False)
    call = parse_answer(CALL_FORMATS["hermes"][0].parser([tool]), walker.walk(text, random.Random(0))).calls[0]
    assert json.loads(call.arguments)["description"] == "description"


def test_equal_schemas_are_written_once():
    tools = [Tool(f"f{number}", parameters=WEATHER.parameters) for number in range(40)]
    for form in (CALL_FORMATS["qwen3_coder"][0], CALL_FORMATS["hermes"][0]):
        text = call_grammar(form, tools, ToolChoice("required")).text
        assert text.count("%json") <= 2


@pytest.fixture(scope="module")
def compiler():
    tokenizer = Tokenizer(str(embedded_model_path()))
    ids = range(len(tokenizer._tokenizer))
    special_ids = frozenset(token_id for token_id in ids if tokenizer.is_special(token_id))
    return GuidanceCompiler(
        Vocabulary([tokenizer.token_bytes[token_id] for token_id in ids], special_ids, (tokenizer.eos_token_id,))
    )


@pytest.mark.parametrize("form", [form for forms in CALL_FORMATS.values() for form in forms])
def test_the_engine_takes_the_grammars_of_thirty_tools(compiler, form):
    tools = [Tool(f"f{number}", parameters=WEATHER.parameters, strict=True) for number in range(30)]
    for choice in (ToolChoice("required"), ToolChoice()):
        for state in ("open", "", "closed"):
            grammar = call_grammar(form, tools, choice, reasoning=THINK, thinking_state=state)
            matcher = compiler.compile(GrammarSpec("lark", grammar.text, grammar.begins_behind)).matcher()
            assert matcher.error is None


NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(NAMES, st.dictionaries(NAMES, st.sampled_from(["string", "integer", "boolean", "array"]), max_size=4), st.data())
def test_a_grammar_is_valid_for_any_names(name, types, data):
    form = data.draw(st.sampled_from([form for forms in CALL_FORMATS.values() for form in forms]))
    required = sorted(data.draw(st.sets(st.sampled_from(sorted(types))))) if types else []
    properties = {key: {"type": kind, **({"maxItems": 1} if kind == "array" else {})} for key, kind in types.items()}
    tool = Tool(name, parameters={"type": "object", "properties": properties, "required": required})
    # Else a text within a list could say what ends the call, which this random writer does often.
    walker = walker_of(form, are_special=True)
    grammar = call_grammar(form, [tool], ToolChoice("required"), special_ids=walker.special_ids)
    answer = walker.walk(grammar.text, random.Random(0))
    if answer is not None:
        parsed = parse_answer(form.parser([tool]), answer)
        assert {call.name for call in parsed.calls} == {name}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 4, "format": "password"},
        {"type": "array", "maxItems": 2, "items": {"type": "null"}, "uniqueItems": False},
    ],
)
def test_a_strict_tool_may_have_what_bars_nothing(schema):
    """The same schema is taken as the form of an answer."""
    tool = Tool("f", parameters={"type": "object", "properties": {"a": schema}}, strict=True)
    walker = walker_of(CALL_FORMATS["hermes"][0], are_special=False)
    grammar = call_grammar(CALL_FORMATS["hermes"][0], (tool,), ToolChoice("required"))
    (call,) = parse_answer(CALL_FORMATS["hermes"][0].parser((tool,)), walker.walk(grammar.text, random.Random(1))).calls
    assert json.loads(call.arguments).keys() <= {"a"}


DEFINED = {
    "type": "object",
    "properties": {f"p{n}": {"anyOf": [{"$ref": "#/$defs/d"}, {"const": n}]} for n in range(300)},
    "$defs": {"d": {"enum": list(range(1000))}},
}


@pytest.mark.parametrize("name", ["qwen3_coder", "gemma4", "pythonic"])
def test_definitions_are_written_for_each_parameter_up_to_a_bound(name):
    """Else the work would be as much as parameters times definitions."""
    with pytest.raises(InvalidParameterError, match="too large") as caught:
        call_grammar(CALL_FORMATS[name][0], (Tool("f", parameters=DEFINED),), ToolChoice("required"))
    assert caught.value.param == "tools"


def test_definitions_are_written_only_where_something_refers_to_them():
    plain = {**DEFINED, "properties": {"n": {"type": "integer"}}}
    grammar = call_grammar(CALL_FORMATS["pythonic"][0], (Tool("f", parameters=plain),), ToolChoice("required"))
    assert "$defs" not in grammar.text
