"""The grammar that holds one answer: what the request asks for, fitted to how the model writes calls and thinking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from engine.core.grammar import GrammarSpec
from engine.dialogue.forced_calls import call_grammar
from engine.dialogue.formats import AnswerFormat
from engine.errors import InvalidParameterError
from engine.generation import Generation
from engine.text.prompt import ChatPrompt


def answer_grammar(
    generation: Generation, form: AnswerFormat | None, marker_ids: Mapping[str, int]
) -> GrammarSpec | None:
    """What the answer is held to; None = nothing.

    Raises InvalidParameterError for calls that cannot be forced.
    form: how the answer is read; None = it is no chat, or nothing reads it.
    marker_ids: the special tokens among the markers of calls and thinking.
    """
    asked = generation.sampling.grammar
    if form is None or not isinstance(generation.prompt, ChatPrompt):
        return asked
    called = _call_grammar(generation, generation.prompt, form, marker_ids)
    if called is not None and asked is not None:
        raise InvalidParameterError(
            "a grammar cannot be combined with a forced call or with strict tools; leave one of them out",
            param="grammar",
        )
    if called is not None or asked is None or asked.begins_behind:
        return called or asked
    thinks = form.reasoning is not None and form.thinking_state == "open" and not _frames(form)
    return replace(asked, begins_behind=form.reasoning.closing) if thinks and form.reasoning else asked


def _frames(form: AnswerFormat) -> bool:
    return form.form is not None and form.form.frames_answers


def _call_grammar(
    generation: Generation, prompt: ChatPrompt, form: AnswerFormat, marker_ids: Mapping[str, int]
) -> GrammarSpec | None:
    """What the calls are held to."""
    choice = generation.tool_choice
    choice.check(prompt.tools)
    if form.form is None:
        if choice.is_forced or any(tool.strict for tool in choice.offered(prompt.tools)):
            raise InvalidParameterError(
                "calls of this model can be neither forced nor strict: it writes them in no known format; use tool_choice "
                "auto and tools that are not strict",
                param="tool_choice",
            )
        return None
    grammar = call_grammar(
        form.form,
        prompt.tools,
        choice,
        is_parallel=generation.has_parallel_calls,
        reasoning=form.reasoning,
        thinking_state=form.thinking_state,
        special_ids=marker_ids,
    )
    return None if grammar is None else GrammarSpec("lark", grammar.text, grammar.begins_behind)
