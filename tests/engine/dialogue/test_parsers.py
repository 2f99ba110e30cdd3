"""Parsers of answers: the same events however an answer is cut, no character lost, and calls read as they were written."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.dialogue.events import (
    Arguments,
    CallCut,
    CallEnd,
    Markup,
    Reasoning,
    Text,
    gather,
    merge_events,
    parse_answer,
)
from engine.dialogue.formats import CALL_FORMATS, AnswerParser, find_form
from engine.dialogue.gemma_calls import KEY
from engine.dialogue.program import PlainParser
from engine.dialogue.reasoning import REASONING_FORMATS, THINK
from engine.dialogue.tools import Tool, schema_types, value_text

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "deep": {"type": "object"},
        "list": {"type": "array"},
        "on": {"type": ["boolean", "null"]},
    },
}
TOOLS = (Tool("weather", parameters=PARAMETERS), Tool("get-time.v2", parameters=PARAMETERS))
FORMS = {f"{name}{index}": form for name, forms in CALL_FORMATS.items() for index, form in enumerate(forms)}


def whole(form, text):
    parser = form.parser(TOOLS)
    return merge_events([*parser.feed(text), *parser.finish()])


def in_pieces(parser, text, cuts):
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    events = []
    for start, end in pairwise(ends):
        events += parser.feed(text[start:end])
    return merge_events([*events, *parser.finish()])


# What a model may write: pieces of all formats, plain text and rubbish, in any order.
MARKS = sorted({mark for form in FORMS.values() for mark in form.markers} | {"<think>", "</think>"})
VALUES = [
    '{"name": "weather", "arguments": {"city": "Ü \\" } </tool_call>", "days": 3}}',
    '{"arguments": {"a": [1, {"b": "]"}]}, "name": "weather"}',
    '{"name": "weather", "parameters": {}}',
    '{"name": "weather", "arguments": "{\\"city\\": 1}"}',
    '{"name": "weather"}',
    '{"city": "x"}',
    '[{"name": "weather", "arguments": {}}, {"name": "get-time.v2", "arguments": {"on": null}}]',
    "[weather(city='it\\'s', days=-3), get-time.v2(deep={'a': True}, list=[1, 'b'])]",
    "weather",
    "functions.weather:3",
    "function",
    "\n```json\n",
    "\n```",
    "analysis",
    "commentary to=functions.weather ",
    "assistant",
]
PIECES = st.one_of(
    st.sampled_from(MARKS),
    st.sampled_from(VALUES),
    st.sampled_from(
        [" ", "\n", "\n\n", '"', "{", "}", "[", "]", ",", ";", ":", "\\", "<", "</", "|>", "'", "x", "=", ">"]
    ),
    st.sampled_from(
        ["<function=weather>\n", "<parameter=city>\n", "\n</parameter>", "</function>", "city", "null", "3"]
    ),
    st.text(max_size=5),
)


@st.composite
def documents(draw):
    pieces = draw(st.lists(PIECES, max_size=16))
    text = "".join(pieces)
    cut = draw(st.integers(0, len(text))) if draw(st.booleans()) else len(text)
    return text[:cut]


@st.composite
def answers(draw, name):
    """An answer with calls in one format, mostly well formed."""
    form = FORMS[name]
    marks = [mark for mark in form.markers if mark]
    pieces = draw(st.lists(st.one_of(PIECES, st.sampled_from([*marks, *VALUES]) if marks else PIECES), max_size=12))
    return "".join(pieces)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_events_are_the_same_however_an_answer_is_cut_and_no_character_is_lost(name, data):
    text = data.draw(st.one_of(documents(), answers(name)))
    cuts = data.draw(st.lists(st.integers(0, max(len(text), 1)), max_size=8))
    expected = whole(FORMS[name], text)
    assert "".join(event.source for event in expected) == text
    assert in_pieces(FORMS[name].parser(TOOLS), text, cuts) == expected
    assert in_pieces(FORMS[name].parser(TOOLS), text, range(len(text))) == expected
    check_order(expected)


def check_order(events):
    """Each call begins, has its arguments and ends before the next one begins; what ends is JSON."""
    is_open, num_begun = False, 0
    for event in events:
        kind = type(event).__name__
        if kind == "CallStart":
            assert not is_open
            assert event.index == num_begun
            is_open, num_begun = True, num_begun + 1
        elif kind in ("Arguments", "CallEnd", "CallCut"):
            assert is_open
            assert event.index == num_begun - 1
            is_open = kind == "Arguments"
        else:
            assert not is_open, "text within a call"
    assert not is_open
    for event in events:
        for value in (getattr(event, "text", ""), getattr(event, "name", "")):
            value.encode()


@settings(max_examples=80, deadline=None)
@given(
    text=documents(),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    name=st.sampled_from(sorted(REASONING_FORMATS)),
    state=st.sampled_from(["open", "closed", ""]),
)
@example(text="<think>\n\n</think>\n\nx", cuts=[3, 9], name="qwen3", state="")
def test_thinking_is_read_the_same_however_an_answer_is_cut(text, cuts, name, state):
    def parser():
        return AnswerParser(REASONING_FORMATS[name].parser(state), CALL_FORMATS["hermes"][0].parser(TOOLS))

    expected = in_pieces(parser(), text, ())
    assert "".join(event.source for event in expected) == text
    assert in_pieces(parser(), text, cuts) == expected
    assert in_pieces(parser(), text, range(len(text))) == expected


@given(st.text())
def test_without_tools_an_answer_is_text(text):
    assert parse_answer(PlainParser(), text).content == text


@pytest.mark.parametrize("name", [name for name in FORMS if not FORMS[name].frames_answers])
@given(text=st.text(alphabet=st.characters(exclude_characters="<[{｜", exclude_categories=["Cs"])))
def test_an_answer_without_calls_is_text_to_the_last_blank(name, text):
    assert parse_answer(FORMS[name].parser(TOOLS), text).content == text


CALL = '{"name": "weather", "arguments": {"city": "Bern", "days": 2}}'
# An answer in each format: text, then two calls (one where a format has no more), and what is to be read.
WRITTEN = {
    "hermes0": (
        f"A.\n<tool_call>\n{CALL}\n</tool_call>\n"
        '<tool_call>\n{"name": "get-time.v2", "arguments": {}}\n</tool_call>'
    ),
    "qwen3_coder0": (
        "A.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=get-time.v2>\n</function>\n</tool_call>"
    ),
    "glm450": (
        "A.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>get-time.v2\n</tool_call>"
    ),
    "minimax_m20": (
        'A.\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Bern</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="get-time.v2">\n</invoke>\n</minimax:tool_call>'
    ),
    "deepseek_v310": (
        "A.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Bern", "days": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get-time.v2<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v30": (
        "A.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Bern", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get-time.v2\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "kimi_k20": (
        "A.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Bern", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.get-time.v2:1'
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "mistral0": 'A.[TOOL_CALLS]weather[ARGS]{"city": "Bern", "days": 2}[TOOL_CALLS]get-time.v2[ARGS]{}',
    "mistral1": f'A.[TOOL_CALLS] [{CALL}, {{"name": "get-time.v2", "arguments": {{}}}}]',
    "openai0": (
        "<|channel|>commentary<|message|>A.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Bern", "days": 2}<|call|><|start|>assistant to=functions.get-time.v2'
        "<|channel|>commentary json<|message|>{}<|call|>"
    ),
    "gemma40": 'A.<|tool_call>call:weather{city:<|"|>Bern<|"|>,days:2}<tool_call|><|tool_call>call:get-time.v2{}<tool_call|>',
    "pythonic0": "A.<|tool_call_start|>[weather(city='Bern', days=2), get-time.v2()]<|tool_call_end|>",
    "pythonic1": "[weather(city='Bern', days=2), get-time.v2()]",
    "llama3_json0": f'{CALL.replace("arguments", "parameters")}; {{"name": "get-time.v2", "parameters": {{}}}}',
}


def test_each_format_has_an_example():
    assert set(WRITTEN) == set(FORMS)


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_read(name):
    answer = parse_answer(FORMS[name].parser(TOOLS), WRITTEN[name])
    assert answer.content == ("" if name in ("pythonic1", "llama3_json0") else "A.")
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [
        ("weather", {"city": "Bern", "days": 2}),
        ("get-time.v2", {}),
    ]
    assert all(call.is_complete for call in answer.calls)
    assert [call.call_id for call in answer.calls] == (
        ["functions.weather:0", "functions.get-time.v2:1"] if name == "kimi_k20" else ["", ""]
    )


@pytest.mark.parametrize("name", WRITTEN)
def test_an_answer_cut_anywhere_tells_the_beginning_of_what_the_whole_one_tells(name):
    text = WRITTEN[name]
    full = parse_answer(FORMS[name].parser(TOOLS), text).calls
    for end in range(len(text)):
        events = whole(FORMS[name], text[:end])
        answer = gather(events)
        for call, other in zip(answer.calls, full, strict=False):
            assert call.name == other.name
            assert other.arguments.startswith(call.arguments)
            assert call.is_complete == (call.arguments == other.arguments)
        assert sum(isinstance(event, CallEnd | CallCut) for event in events) == len(answer.calls)


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in ("pythonic0", "pythonic1", "gemma40")])
def test_arguments_are_told_as_they_come(name):
    parser = FORMS[name].parser(TOOLS)
    told = []
    for char in WRITTEN[name]:
        told += [event for event in parser.feed(char) if type(event).__name__ == "Arguments"]
    assert len(told) > 4


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f", "arguments": {"a":1 ,  "b":1.0,"c":"\\u00fc"}}', '{"a":1 ,  "b":1.0,"c":"\\u00fc"}'),
        ('{"arguments":{"z":1,"a":2}, "id": 7, "name":"f"}', '{"z":1,"a":2}'),
        ('{"type": "function", "name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": {"a": {"name": "f", "arguments": {}}}}', '{"a": {"name": "f", "arguments": {}}}'),
        ('{"name": "f", "arguments": {"a": "</tool_call>"}}', '{"a": "</tool_call>"}'),
        ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),
    ],
)
def test_the_text_of_arguments_is_what_the_model_wrote(text, arguments):
    answer = parse_answer(CALL_FORMATS["hermes"][0].parser(()), f"<tool_call>\n{text}\n</tool_call>")
    assert [(call.name, call.arguments, call.is_complete) for call in answer.calls] == [("f", arguments, True)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes0", "<tool_call>\nno JSON\n</tool_call>"),
        ("hermes0", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes0", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes0", '<tool_call>{"name": "f", "arguments": 3}</tool_call>'),
        ("hermes0", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes0", '<tool_call>{"name": "f", "argum'),
        ("qwen3_coder0", "<tool_call>\nnothing\n</tool_call>"),
        ("qwen3_coder0", "<function=f"),
        ("glm450", "<tool_call>\n</tool_call>"),
        ("deepseek_v30", "<｜tool▁calls▁begin｜>nothing"),
        ("kimi_k20", "<|tool_call_begin|>no id{}"),
        ("mistral0", "[TOOL_CALLS] nothing at all"),
        ("mistral0", "[TOOL_CALLS]" + "x" * 600 + "{}"),
        ("pythonic0", "<|tool_call_start|>[weather(1)]<|tool_call_end|>"),
        ("pythonic0", "<|tool_call_start|>[weather(city=open('x'))]<|tool_call_end|>"),
        ("gemma40", "<|tool_call>call:f{a:<tool_call|>"),
        ("gemma40", '<|tool_call>call:f{a:<|"|>x'),
        ("gemma40", "<|tool_call>f{}<tool_call|>"),
        ("pythonic1", "[1, 2, 3]"),
        ("pythonic1", "[unknown(a=1)]"),
        ("pythonic1", "[weather(city='it's')]"),
        ("llama3_json0", '{"name": "Ann", "parameters": {}}'),
        ("llama3_json0", '{"answer": 42}'),
        ("llama3_json0", '<|python_tag|>print("x")'),
    ],
)
def test_what_is_no_call_is_text(name, text):
    answer = parse_answer(FORMS[name].parser(TOOLS), text)
    assert answer.calls == ()
    assert answer.content == text


def test_a_call_that_stops_making_sense_ends_there_and_the_rest_is_text():
    answer = parse_answer(CALL_FORMATS["hermes"][0].parser(()), '<tool_call>{"name": "f", "arguments": {"a": ]}} tail')
    (call,) = answer.calls
    assert (call.arguments, call.is_complete) == ('{"a": ', False)
    assert answer.content == "]}} tail"


def test_the_token_that_ended_the_answer_closes_a_call_if_it_is_a_marker():
    form = CALL_FORMATS["qwen3_coder"][0]
    text = "<tool_call>\n<function=weather>\n<parameter=city>\nx\n</parameter>\n"
    assert not parse_answer(form.parser(TOOLS), text, "<|im_end|>").calls[0].is_complete
    assert parse_answer(form.parser(TOOLS), text, "</function>").calls[0].is_complete
    assert parse_answer(form.parser(TOOLS), "x", "<|im_end|>").content == "x"


@pytest.mark.parametrize(
    ("written", "types", "value"),
    [
        ("5", {"string"}, "5"),
        ("5", {"integer"}, 5),
        ("5", {"number"}, 5),
        ("5.0", {"integer"}, 5.0),
        ("5.5", {"integer"}, "5.5"),
        ("True", {"boolean"}, True),
        ("None", {"string", "null"}, None),
        ("null", {"string"}, "null"),
        ('{"a": 1}', {"object"}, {"a": 1}),
        ("[1", {"array"}, "[1"),
        ("NaN", {"number"}, "NaN"),
        ("x", set(), "x"),
        ("3", set(), 3),
        ('"q"', set(), '"q"'),
    ],
)
def test_a_value_is_what_its_schema_says(written, types, value):
    assert json.loads(value_text(written, frozenset(types))) == value
    assert type(json.loads(value_text(written, frozenset(types)))) is type(value)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"properties": {"city": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}, 5),
        ({"properties": {"city": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}}, 5),
        ({"properties": {"city": {"enum": [5, 6]}}}, 5),
        ({"properties": {"city": {"const": "5"}}}, "5"),
        ({"properties": {"city": {"$ref": "#/properties/city"}}}, 5),  # a circle says nothing: JSON where it is some
        ({"properties": {}}, "5"),  # no such parameter
        ({}, "5"),
    ],
)
def test_the_type_of_a_tagged_value_is_found_in_the_schema(parameters, expected):
    form = CALL_FORMATS["glm45"][0]
    text = "<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>5</arg_value>\n</tool_call>"
    (call,) = parse_answer(form.parser([Tool("f", parameters=parameters)]), text).calls
    assert json.loads(call.arguments) == {"city": expected}


@pytest.mark.parametrize(
    ("state", "text", "reasoning", "content"),
    [
        ("", "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("", "yes <think>no</think>", "", "yes <think>no</think>"),
        ("open", "hm\n</think>\n\nyes", "hm", "yes"),
        ("open", "<think>hm</think>yes", "hm", "yes"),
        ("open", "hm and the answer was cut", "hm and the answer was cut", ""),
        ("closed", "yes </think>", "", "yes </think>"),
        ("", "<think>\n\n</think>\n\nyes", "", "yes"),
    ],
)
def test_thinking_ends_before_the_answer(state, text, reasoning, content):
    answer = parse_answer(AnswerParser(THINK.parser(state), PlainParser()), text)
    assert (answer.reasoning, answer.content) == (reasoning, content)


@pytest.mark.parametrize(
    ("name", "tail", "state"),
    [
        ("qwen3", "", ""),
        ("qwen3", "<think>\n", "open"),
        ("qwen3", "<think>\n\n</think>\n\n", "closed"),
        ("qwen3", "</think>", "closed"),
        ("qwen3", "<think>half a thought", "open"),
        ("deepseek_r1", "", "open"),
        ("gemma4", "<|channel>thought\n<channel|>", "closed"),
    ],
)
def test_the_prompt_says_whether_thinking_has_begun(name, tail, state):
    assert REASONING_FORMATS[name].state_at(tail) == state


def test_the_template_decides_between_forms_of_one_format():
    list_form, named_form = find_form("mistral", "[TOOL_CALLS] [{..}]"), find_form("mistral", "[TOOL_CALLS]f[ARGS]")
    assert (list_form.is_list, named_form.is_list) == (True, False)
    assert find_form("pythonic", "<|tool_call_start|><|tool_call_end|>").opening
    assert not find_form("pythonic", "").opening


@pytest.mark.parametrize("name", FORMS)
def test_work_is_linear_in_the_answer(name):
    """Characters are read a bounded number of times: what waits to be read stays short, whatever the model writes."""
    marks = [mark for mark in FORMS[name].markers if mark]
    parser = FORMS[name].parser(TOOLS)
    longest = 0
    for piece in ["  ", "\n", "<", "x", *marks, *VALUES, '{"a": "'] * 20:
        for char in piece:
            parser.feed(char)
            longest = max(longest, len(parser._text))
    assert longest <= 600


class _NeverAppended(str):
    """A text that cannot be made longer piece by piece, which would copy it once for each piece."""

    def __add__(self, other):
        raise AssertionError("copied for each piece that follows")


@pytest.mark.parametrize("make", [Text, Reasoning, Markup, lambda text: Arguments(0, text, text)])
def test_neighbours_are_joined_at_once(make):
    assert merge_events([make(_NeverAppended("a")), make(_NeverAppended("b")), make("c")]) == [make("abc")]


class _Counted(str):
    """A text that counts the characters which are copied from it; its parts count, too."""

    num_copied = 0

    def __getitem__(self, key):
        part = str.__getitem__(self, key)
        type(self).num_copied += len(part)
        return part


def test_a_whole_answer_is_not_copied_for_each_marker_in_it():
    parser = FORMS["hermes0"].parser(TOOLS)
    text = _Counted("<tool_call>x" * 500)
    _Counted.num_copied = 0
    parser._text = text
    assert "".join(event.source for event in parser._go_on()) == text
    assert _Counted.num_copied < 20 * len(text)


def test_a_text_without_an_end_is_not_looked_for_at_each_of_its_quotation_marks():
    """Escaped ones are no beginnings, even if the answer ends within an escape."""
    broken = 'call:weather{city:"' + '\\"' * 20 + "\\"
    assert [match.start() for match in KEY.finditer(broken)] == [broken.index("{"), broken.index('"')]


def test_a_schema_that_refers_to_its_parts_in_too_many_ways_does_not_say():
    """By all ways that lead to the last one it would be 100^8 parts."""
    definitions = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 100} for n in range(8)}
    root = {"$defs": {**definitions, "a8": {"type": "string"}}}
    assert schema_types({"$ref": "#/$defs/a0"}, root) == set()
    assert schema_types({"$ref": "#/$defs/a8"}, root) == {"string"}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"enum": [1, None, True]}, {"integer", "null", "boolean"}),
        ({"const": None}, {"null"}),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/n"}]}, {"string", "number"}),
        ({"anyOf": [{"type": "string"}, {}]}, set()),
        ({"anyOf": [{"type": "string"}, True]}, set()),
        ({"anyOf": []}, set()),
        ({"$ref": "#/$defs/none"}, set()),
        ({"$ref": "#/$defs/self"}, set()),
        ({}, set()),
    ],
)
def test_a_schema_says_which_types_it_allows(schema, types):
    assert schema_types(schema, {"$defs": {"n": {"type": "number"}, "self": {"$ref": "#/$defs/self"}}}) == types
