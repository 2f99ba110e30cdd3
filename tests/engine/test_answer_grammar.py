"""What holds an answer, by what is asked and by how the model writes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.answer_grammar import answer_grammar
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
    for form in (HERMES, replace(HERMES, thinking_state=""), AnswerFormat(HERMES.form), None):
        assert answer_grammar(asked, form, {}) == JSON
    framed = AnswerFormat(CALL_FORMATS["openai"][0], THINK, "open")
    assert answer_grammar(asked, framed, {}) == JSON
    text = replace(asked, prompt=TextPrompt("hi"))
    assert answer_grammar(text, replace(HERMES, thinking_state="open"), {}) == JSON


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
        (generation(JSON, Tool("f"), choice="required"), HERMES, "grammar"),
        (generation(JSON, Tool("f", strict=True)), HERMES, "grammar"),
        (generation(None, choice="required"), HERMES, "tool_choice"),
        (generation(None, Tool("f"), choice="required"), AnswerFormat(), "tool_choice"),
        (generation(None, Tool("f", strict=True)), AnswerFormat(), "tool_choice"),
    ],
)
def test_what_cannot_be_held(asked: Generation, form: AnswerFormat, param: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        answer_grammar(asked, form, {})
    assert caught.value.param == param
