"""The formats in which models write calls, by vLLM's names, and the parser of a whole answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from engine.dialogue.calls_first import CallsFirstParser
from engine.dialogue.events import Event, Parser, Text
from engine.dialogue.gemma_calls import GemmaCalls
from engine.dialogue.harmony import ANALYSIS, Harmony
from engine.dialogue.json_calls import BareJson, MarkedJson, NamedJson
from engine.dialogue.program import PlainParser
from engine.dialogue.python_calls import PythonCalls
from engine.dialogue.reasoning import ReasoningFormat
from engine.dialogue.response_template import ResponseTemplateParser
from engine.dialogue.tagged_calls import TaggedCalls
from engine.dialogue.tools import Tool

NAME = r"(?P<name>[^\s{}<>\[\]]{1,256}?)"


def _deepseek(words: str) -> str:
    """A marker in DeepSeek's characters."""
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


class CallFormat(Protocol):
    """How a model writes calls."""

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that mean something in it; they have to reach the parser even if they are special tokens."""

    @property
    def signature(self) -> tuple[str, ...]:
        """Texts that a chat template which writes this format contains."""

    @property
    def frames_answers(self) -> bool:
        """Whether all of an answer is in it, so that it has to be read even if nothing can be called."""

    def parser(self, tools: Sequence[Tool]) -> Parser:
        """A parser of one answer that may call these tools."""


MISTRAL = NamedJson(
    "[TOOL_CALLS]",
    "",
    head=rf"\s*{NAME}(?:\[CALL_ID\](?P<id>\w+))?(?:\[ARGS\])?\s*",
    head_text="{name}[ARGS]",
    head_markers=("[ARGS]", "[CALL_ID]"),
    takes_objects=True,
)

# Each name's forms, of which the model's chat template decides: see find_form. `auto` tries them in this order.
CALL_FORMATS: dict[str, tuple[CallFormat, ...]] = {
    "hermes": (MarkedJson("<tool_call>", "</tool_call>"),),
    "qwen3_coder": (
        TaggedCalls(
            "<tool_call>",
            "</tool_call>",
            name=("<function=", ">"),
            key=("<parameter=", ">"),
            value=("", "</parameter>"),
            end="</function>",
            pad="\n",
            begins_with_name=True,
        ),
    ),
    "glm45": (
        TaggedCalls(
            "<tool_call>",
            "</tool_call>",
            name=("", ""),
            key=("<arg_key>", "</arg_key>"),
            value=("<arg_value>", "</arg_value>"),
        ),
    ),
    "minimax_m2": (
        TaggedCalls(
            "<minimax:tool_call>",
            "</minimax:tool_call>",
            name=('<invoke name="', '">'),
            key=('<parameter name="', '">'),
            value=("", "</parameter>"),
            end="</invoke>",
        ),
    ),
    "deepseek_v31": (
        NamedJson(
            _deepseek("tool call begin"),
            _deepseek("tool call end"),
            head=rf"{NAME}{_deepseek('tool sep')}\s*",
            head_text=f"{{name}}{_deepseek('tool sep')}",
            section=(_deepseek("tool calls begin"), _deepseek("tool calls end")),
            head_markers=(_deepseek("tool sep"),),
        ),
    ),
    "deepseek_v3": (
        NamedJson(
            _deepseek("tool call begin"),
            _deepseek("tool call end"),
            head=rf"\s*function{_deepseek('tool sep')}{NAME}\s*```json\s*",
            head_text=f"function{_deepseek('tool sep')}{{name}}\n```json\n",
            tail="\n```",
            section=(_deepseek("tool calls begin"), _deepseek("tool calls end")),
            separator="\n",
            head_markers=(_deepseek("tool sep"),),
        ),
    ),
    "kimi_k2": (
        NamedJson(
            "<|tool_call_begin|>",
            "<|tool_call_end|>",
            head=rf"\s*(?P<id>(?:functions\.)?{NAME}:[0-9]+)\s*<\|tool_call_argument_begin\|>\s*",
            head_text="functions.{name}:{index}<|tool_call_argument_begin|>",
            section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            head_markers=("<|tool_call_argument_begin|>",),
        ),
    ),
    "mistral": (MISTRAL, replace(MISTRAL, is_list=True)),
    "openai": (Harmony(),),
    "gemma4": (GemmaCalls(),),
    "llama3_json": (BareJson("<|python_tag|>"),),
    "pythonic": (PythonCalls("<|tool_call_start|>", "<|tool_call_end|>"), PythonCalls()),
}
# The values of the option `tool_call_parser`.
TOOL_CALL_PARSERS = ("auto", "none", "response_template", *CALL_FORMATS)


def find_form(name: str, template: str) -> CallFormat:
    """The form of a format that a chat template writes; the last one if it writes none.

    name: one of CALL_FORMATS.
    """
    forms = CALL_FORMATS[name]
    return next((form for form in forms if all(text in template for text in form.signature)), forms[-1])


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How one answer is to be read. Plain data, so that it travels to where the answer is told.

    form: of its calls; None = it has none.
    reasoning: of its thinking; None = it has none.
    thinking_state: where it begins: see ReasoningFormat.state_at.
    response_template: for transformers' parser, which then reads all of it.
    prompt_end: what that parser has to see of the prompt.
    calls_first: an answer that does not begin with a call, behind its thinking, is a text of a given form as a whole.
    """

    form: CallFormat | None = None
    reasoning: ReasoningFormat | None = None
    thinking_state: str = "closed"
    response_template: Mapping[str, Any] | None = None
    prompt_end: str = ""
    calls_first: bool = False

    @property
    def thinking(self) -> ReasoningFormat | None:
        """How the thinking is marked in it; None = it has none, or nothing is known of it."""
        if self.form is not None and self.form.frames_answers:
            return ANALYSIS
        return None if self.thinking_state == "closed" else self.reasoning

    def parser(self, tools: Sequence[Tool] = ()) -> Parser:
        """A parser of the answer.

        tools: that it may call; without any, what looks like a call is text.
        """
        if self.response_template is not None:
            return ResponseTemplateParser(self.response_template, tools, self.prompt_end)
        frames_answers = self.form is not None and self.form.frames_answers
        calls = self.form.parser(tools) if self.form is not None and (tools or frames_answers) else PlainParser()
        if frames_answers:
            return calls
        if self.calls_first:
            calls = CallsFirstParser(calls)
        if self.reasoning is None:
            return calls
        return AnswerParser(self.reasoning.parser(self.thinking_state), calls)


class AnswerParser:
    """Reads a whole answer: what `reasoning` tells as text goes to `calls`. See Parser."""

    def __init__(self, reasoning: Parser, calls: Parser) -> None:
        self._reasoning = reasoning
        self._calls = calls

    def feed(self, text: str) -> list[Event]:
        """See Parser.feed."""
        return self._read(self._reasoning.feed(text))

    def finish(self, end_token: str = "") -> list[Event]:
        """See Parser.finish."""
        return [*self._read(self._reasoning.finish(end_token)), *self._calls.finish(end_token)]

    def _read(self, events: Iterable[Event]) -> list[Event]:
        told: list[Event] = []
        for event in events:
            if isinstance(event, Text):
                told += self._calls.feed(event.text)
            else:
                told.append(event)
        return told
