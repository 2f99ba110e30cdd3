"""The grammar that holds one answer: what the request asks for, fitted to how the model writes calls and thinking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine.core.grammar import GrammarSpec
from engine.core.thinking import ThinkingSpan
from engine.dialogue.forced_calls import Beside, call_grammar
from engine.dialogue.formats import AnswerFormat
from engine.dialogue.tools import Tool
from engine.errors import InvalidParameterError
from engine.generation import Generation
from engine.text.prompt import ChatPrompt


def answer_grammar(
    generation: Generation, form: AnswerFormat | None, marker_ids: Mapping[str, int], *, is_loose: bool = False
) -> GrammarSpec | None:
    """What the answer is held to; None = nothing.

    Raises InvalidParameterError for calls that cannot be forced.
    form: how the answer is read; None = it is no chat, or nothing reads it.
    marker_ids: the special tokens among the markers of calls and thinking.
    is_loose: leave out what the schemas of tools that are not strict say of values: see has_loose_tools.
    """
    prompt = generation.prompt
    if form is None or not isinstance(prompt, ChatPrompt):
        return generation.sampling.grammar
    tools = prompt.tools
    if is_loose:
        tools = tuple(tool if tool.strict else tool.with_any_values() for tool in tools)
    generation.tool_choice.check(tools)
    _check_format(generation, tools, form)
    return _hold(generation, tools, form, marker_ids)


def thinking_span(form: AnswerFormat | None) -> ThinkingSpan | None:
    """Which part of an answer is thinking; None = none of it, as far as is known."""
    thinking = None if form is None else form.thinking
    if form is None or thinking is None:
        return None
    is_begun = not thinking.repeats and form.thinking_state == "open"
    return ThinkingSpan("" if is_begun else thinking.opening.strip(), thinking.closing, thinking.repeats)


def has_loose_tools(generation: Generation) -> bool:
    """Whether a grammar of these calls has parts that it may do without.

    The schema of a tool that is not strict is kept as far as possible: a fault in it keeps no model from calling.
    """
    prompt = generation.prompt
    if not isinstance(prompt, ChatPrompt):
        return False
    return any(tool.parameters and not tool.strict for tool in generation.tool_choice.offered(prompt.tools))


def _check_format(generation: Generation, tools: Sequence[Tool], form: AnswerFormat) -> None:
    """Raises InvalidParameterError for what needs a grammar of calls, if there is none of this model's."""
    offered = generation.tool_choice.offered(tools)
    if form.form is not None or not offered:
        return
    if generation.tool_choice.is_forced or any(tool.strict for tool in offered):
        raise InvalidParameterError(
            "calls of this model can be neither forced nor strict: it writes them in no known format; use tool_choice "
            "auto and tools that are not strict",
            param="tool_choice",
        )
    if generation.sampling.grammar is not None and form.response_template is not None:
        raise InvalidParameterError(
            "this model's answers are of a given form or call tools, but not either: it writes calls in no known format; "
            "leave out the form or the tools",
            param="grammar",
        )


def _hold(
    generation: Generation, tools: Sequence[Tool], form: AnswerFormat, marker_ids: Mapping[str, int]
) -> GrammarSpec | None:
    """What the answer is held to with these tools; None = nothing."""
    asked = generation.sampling.grammar
    grammar = call_grammar(
        form.form,
        tools,
        generation.tool_choice,
        is_parallel=generation.has_parallel_calls and generation.tool_choice.mode != "named",
        reasoning=None if asked is not None and asked.begins_behind else form.reasoning,
        thinking_state=form.thinking_state,
        special_ids=marker_ids,
        beside=Beside.ANY_TEXT if asked is None else Beside.JSON if asked.is_json else Beside.FORM,
    )
    if grammar is None:
        is_framed = form.form is not None and form.form.frames_answers
        thinks = form.reasoning is not None and form.thinking_state == "open" and not is_framed
        if asked is None or asked.begins_behind or form.reasoning is None or not thinks:
            return asked
        return replace(asked, begins_behind=form.reasoning.closing)
    if asked is not None and not generation.tool_choice.is_forced:
        beginnings = grammar.beginnings if asked.kind == "regex" else ()
        asked = replace(asked, never_begins=beginnings)
        return GrammarSpec("lark", grammar.text, grammar.begins_behind, form=asked)
    return GrammarSpec("lark", grammar.text, grammar.begins_behind)
