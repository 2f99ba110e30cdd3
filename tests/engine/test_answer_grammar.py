"""What holds an answer, by what is asked and by how the model writes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.answer_grammar import answer_grammar, has_loose_tools
from engine.core.grammar import GrammarSpec
from engine.core.request import SamplingParams
from engine.dialogue.formats import CALL_FORMATS, AnswerFormat
from engine.dialogue.reasoning import THINK
from engine.dialogue.tools import Tool, ToolChoice
from engine.errors import InvalidParameterError
from engine.generation import Generation
from engine.text.prompt import ChatPrompt, TextPrompt

JSON = GrammarSpec.json_object()
HERMES = AnswerFormat(CALL_FORMATS["hermes"][0], THINK, "closed")


def generation(grammar: GrammarSpec | None, *tools: Tool, choice: str = "auto") -> Generation:
    prompt = ChatPrompt((("user", "hi"),), tools=tools)
    return Generation("r", None, prompt, SamplingParams(grammar=grammar), tool_choice=ToolChoice(choice))


def test_a_form_begins_behind_thinking_that_the_prompt_has_begun() -> None:
    asked = generation(JSON)
    assert answer_grammar(asked, replace(HERMES, thinking_state="open"), {}) == replace(JSON, begins_behind="</think>")
    for form in (HERMES, AnswerFormat(HERMES.form), AnswerFormat(), None):
        assert answer_grammar(asked, form, {}) == JSON
    text = replace(asked, prompt=TextPrompt("hi"))
    assert answer_grammar(text, replace(HERMES, thinking_state="open"), {}) == JSON


@pytest.mark.parametrize("form", [replace(HERMES, thinking_state=""), AnswerFormat(CALL_FORMATS["openai"][0])])
def test_a_form_begins_behind_thinking_that_the_model_begins_itself(form: AnswerFormat) -> None:
    spec = answer_grammar(generation(JSON), form, {})
    assert spec is not None
    assert (spec.kind, spec.form) == ("lark", JSON)
    assert "analysis" in spec.text or "<think>" in spec.text


def test_beside_tools_an_answer_has_the_form_or_calls() -> None:
    text = GrammarSpec("regex", "a*")
    for asked in (JSON, text):
        spec = answer_grammar(generation(asked, Tool("f")), replace(HERMES, thinking_state="open"), {})
        assert spec is not None
        assert (spec.kind, spec.begins_behind) == ("lark", "</think>")
        assert spec.form == (asked if asked.is_json else replace(text, never_begins=("<tool_call>",)))
        assert answer_grammar(generation(asked, Tool("f"), choice="none"), HERMES, {}) == asked
        forced = answer_grammar(generation(asked, Tool("f"), choice="required"), HERMES, {})
        assert forced == answer_grammar(generation(None, Tool("f"), choice="required"), HERMES, {})
        assert answer_grammar(generation(asked, Tool("f")), AnswerFormat(), {}) == asked, "nothing it writes is a call"


def test_one_call_at_most_has_a_grammar() -> None:
    asked = replace(generation(None, Tool("f")), has_parallel_calls=False)
    assert answer_grammar(asked, HERMES, {}) is not None
    assert answer_grammar(asked, AnswerFormat(response_template={}), {}) is None
    assert answer_grammar(replace(generation(None), has_parallel_calls=False), HERMES, {}) is None


def test_what_a_schema_says_of_values_can_be_left_out() -> None:
    strict = Tool("g", parameters={"properties": {"b": {"maximum": 7}}}, strict=True)
    tool = Tool("f", parameters={"properties": {"a": {"maximum": 5}}, "required": ["a"]})
    asked = generation(None, tool, strict, choice="required")
    assert has_loose_tools(asked)
    assert not has_loose_tools(generation(None, strict, choice="required"))
    tight, loose = (answer_grammar(asked, HERMES, {}, is_loose=is_loose) for is_loose in (False, True))
    assert tight is not None
    assert loose is not None
    assert [word in spec.text for spec in (tight, loose) for word in ('"maximum": 5', '"maximum": 7', '"a"')] == [
        *(True, True, True),
        *(False, True, True),
    ]


def test_calls_have_a_grammar_if_they_are_forced_or_strict() -> None:
    free, strict = Tool("f"), Tool("f", strict=True)
    assert answer_grammar(generation(None, free), HERMES, {}) is None
    assert answer_grammar(generation(None, strict, choice="none"), HERMES, {}) is None
    for asked in (generation(None, free, choice="required"), generation(None, strict)):
        spec = answer_grammar(asked, replace(HERMES, thinking_state="open"), {})
        assert spec is not None
        assert (spec.kind, spec.begins_behind) == ("lark", "</think>")
        assert answer_grammar(asked, None, {}) is None


@pytest.mark.parametrize(
    ("asked", "form", "param"),
    [
        (generation(JSON, Tool("f")), AnswerFormat(response_template={}), "grammar"),
        (generation(None, choice="required"), HERMES, "tool_choice"),
        (generation(None, Tool("f"), choice="required"), AnswerFormat(), "tool_choice"),
        (generation(None, Tool("f", strict=True)), AnswerFormat(), "tool_choice"),
    ],
)
def test_what_cannot_be_held(asked: Generation, form: AnswerFormat, param: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        answer_grammar(asked, form, {})
    assert caught.value.param == param
