"""What a model's chat template does, found out by probes when the model is loaded.

The format of calls is the one whose parser reads the template's own rendering of two calls back to what they were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.dialogue.events import parse_answer
from engine.dialogue.formats import CALL_FORMATS, CallFormat, find_form
from engine.dialogue.reasoning import REASONING_FORMATS
from engine.dialogue.tools import Tool

# Renders messages as apply_chat_template does; raises whatever the template raises.
Render = Callable[..., str]

_CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
PROBE_TOOLS = (Tool("probe_weather", "A probe.", _CITY), Tool("probe_time", "Another probe.", _CITY))
PROBE_ARGUMENTS: tuple[dict[str, Any], ...] = ({"city": "Paris", "days": 3}, {"city": "Rome"})
USER = {"role": "user", "content": "probe"}
THOUGHT = "a probing thought"
# Where templates look for an assistant's thinking.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a chat template does.

    text: the template.
    knows_tools: tools appear in the prompt.
    writes_calls: the calls of an assistant's message do.
    has_text_arguments: it takes a call's arguments as JSON text; else as an object.
    has_empty_content: a message that only calls has the content ""; else none at all.
    has_parallel_calls: it renders all calls of a message, not just one.
    takes_system: it renders a system message.
    takes_late_system: also one behind other messages.
    reasoning_keys: where it looks for thinking; those that appear in the prompt.
    has_reasoning_beside_content: it takes thinking and content in one message that calls.
    assistant_header: what begins an answer in the prompt; empty if it could not be told.
    """

    text: str
    knows_tools: bool = False
    writes_calls: bool = False
    has_text_arguments: bool = False
    has_empty_content: bool = True
    has_parallel_calls: bool = True
    takes_system: bool = True
    takes_late_system: bool = True
    reasoning_keys: tuple[str, ...] = ()
    has_reasoning_beside_content: bool = True
    assistant_header: str = ""

    def reads(self, variable: str) -> bool:
        """Whether the template says this word at all."""
        return variable in self.text


@dataclass(frozen=True, slots=True)
class FoundFormat:
    """A format of calls and why it was chosen, as a sentence for the log."""

    name: str
    form: CallFormat | None
    reason: str


def probe_template(render: Render, text: str) -> tuple[TemplateTraits, FoundFormat | None]:
    """What a template does, and the format whose parser reads the calls that it writes, if there is one.

    render: renders it; text: the template itself.
    """
    definitions = [tool.definition() for tool in PROBE_TOOLS]
    plain, with_tools = _try(render, [USER]), _try(render, [USER], tools=definitions)
    knows_tools = with_tools is not None and with_tools != plain
    header = _assistant_header(render)
    calls, found = _probe_calls(render, text)
    has_text_arguments = calls is not None and calls.has_text_arguments

    def assistant(content: str, **more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": content, **more}

    reasoning_keys = tuple(
        key for key in REASONING_KEYS if THOUGHT in (_try(render, [USER, assistant("x", **{key: THOUGHT})]) or "")
    )
    message = _calling_message(1, has_text_arguments)
    both = {**message, "content": "x", **dict.fromkeys(reasoning_keys, THOUGHT)}
    told = {"role": "system", "content": THOUGHT}
    system, late_system = _try(render, [told, USER]), _try(render, [USER, assistant("x"), told, USER])
    traits = TemplateTraits(
        text,
        knows_tools=knows_tools,
        writes_calls=calls is not None,
        has_text_arguments=has_text_arguments,
        has_empty_content=calls is None or calls.has_empty_content,
        has_parallel_calls=calls is None or calls.num_calls > 1,
        takes_system=THOUGHT in (system or ""),
        takes_late_system=THOUGHT in (late_system or ""),
        reasoning_keys=reasoning_keys,
        has_reasoning_beside_content=calls is None or _try(render, [USER, both], tools=definitions) is not None,
        assistant_header=header,
    )
    return traits, found


def choose_format(
    name: str, traits: TemplateTraits, found: FoundFormat | None, has_response_template: bool
) -> FoundFormat:
    """The format that the option `tool_call_parser` stands for.

    name: of CALL_FORMATS, "response_template", "none" or "auto".
    """
    if name in CALL_FORMATS:
        return FoundFormat(name, find_form(name, traits.text), f"Calls are read as {name}, as tool_call_parser says.")
    if name in ("none", "response_template"):
        return FoundFormat(name, None, f"Calls are read as {name}, as tool_call_parser says.")
    if found is not None:
        return found
    if has_response_template:
        return FoundFormat("response_template", None, "Calls are read as the tokenizer's response_template says.")
    if not traits.knows_tools:
        return FoundFormat(
            "hermes",
            find_form("hermes", traits.text),
            "Calls are read as hermes: the model's chat template knows no tools, so they are listed in a system message.",
        )
    named = max(CALL_FORMATS, key=lambda each: _num_marks(each, traits.text))
    if _num_marks(named, traits.text):
        return FoundFormat(
            named,
            find_form(named, traits.text),
            f"Calls are read as {named}: the model's chat template contains that format's markers.",
        )
    return FoundFormat(
        "none",
        None,
        "Calls are not read: the model's chat template lists tools, but in no known format; set tool_call_parser.",
    )


def choose_reasoning(name: str, traits: TemplateTraits) -> str:
    """The format that the option `reasoning_parser` stands for: a name of REASONING_FORMATS, or "none"."""
    if name != "auto":
        return name
    for each in ("qwen3", "magistral", "gemma4"):
        if REASONING_FORMATS[each].closing in traits.text:
            return each
    return "none"


def _num_marks(name: str, text: str) -> int:
    """How many texts of a format's signature a template contains; none unless it contains all."""
    return max(
        len(form.signature) if all(mark in text for mark in form.signature) else 0 for form in CALL_FORMATS[name]
    )


def _try(render: Render, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str | None:
    """The rendered text; None if the template fails, with whatever it raises."""
    try:
        return render(messages, **kwargs)
    except Exception:  # a template is a program
        return None


def _assistant_header(render: Render) -> str:
    """What a prompt ends with for an answer, up to where thinking is opened or closed."""
    without, with_header = _try(render, [USER]), _try(render, [USER], add_generation_prompt=True)
    if without is None or with_header is None or not with_header.startswith(without):
        return ""
    header = with_header[len(without) :]
    for form in REASONING_FORMATS.values():
        for marker in form.markers:
            header = header.split(marker)[0]
    return header


def _calling_message(num_calls: int, has_text_arguments: bool, has_empty_content: bool = True) -> dict[str, Any]:
    """A message with the first probes' calls."""
    calls = [
        {
            "id": f"functions.{tool.name}:{index}",
            "type": "function",
            "function": {"name": tool.name, "arguments": json.dumps(arguments) if has_text_arguments else arguments},
        }
        for index, (tool, arguments) in enumerate(zip(PROBE_TOOLS, PROBE_ARGUMENTS, strict=True))
    ]
    content = {"content": ""} if has_empty_content else {}
    return {"role": "assistant", **content, "tool_calls": calls[:num_calls]}


@dataclass(frozen=True, slots=True)
class _Probe:
    """A message with calls as the template writes it, and how it was given to the template."""

    answer: str
    num_calls: int
    has_text_arguments: bool
    has_empty_content: bool


def _probes(render: Render) -> Iterator[_Probe]:
    """Messages with calls that the template does not fail with, the best ways to give them first."""
    for num_calls in (2, 1):
        for has_text_arguments in (False, True):
            for has_empty_content in (True, False):
                answer = _answer(render, _calling_message(num_calls, has_text_arguments, has_empty_content))
                if answer is not None and PROBE_TOOLS[0].name in answer:
                    yield _Probe(answer, num_calls, has_text_arguments, has_empty_content)


def _probe_calls(render: Render, text: str) -> tuple[_Probe | None, FoundFormat | None]:
    """The first probe that is read back, and the format; else the first one that is written at all."""
    probes = list(_probes(render))
    for probe in probes:
        for name, form in _candidates(text):
            if num_read := _num_read(form, probe.answer):
                reason = f"Calls are read as {name}: its parser reads what the model's chat template writes."
                return replace(probe, num_calls=num_read), FoundFormat(name, form, reason)
    return (probes[0] if probes else None), None


def _candidates(text: str) -> Iterator[tuple[str, CallFormat]]:
    for name in CALL_FORMATS:
        yield name, find_form(name, text)


def _answer(render: Render, message: Mapping[str, Any]) -> str | None:
    """The text that stands for an assistant's message, if it can be told from what stands before."""
    definitions = [tool.definition() for tool in PROBE_TOOLS]
    whole = _try(render, [USER, message], tools=definitions)
    prompts = [_try(render, [USER], tools=definitions, add_generation_prompt=header) for header in (True, False)]
    if whole is None or prompts[1] is None:
        return None
    for prompt in prompts:
        if prompt is not None and whole.startswith(prompt):
            return whole[len(prompt) :]
    pairs = enumerate(zip(whole, prompts[1], strict=False))
    return whole[next((place for place, (one, other) in pairs if one != other), 0) :]


def _num_read(form: CallFormat, answer: str) -> int:
    """How many of the probes' calls are read in a text; 0 if there is anything wrong with them."""
    parsed = parse_answer(form.parser(PROBE_TOOLS), answer)
    for call, tool, arguments in zip(parsed.calls, PROBE_TOOLS, PROBE_ARGUMENTS, strict=False):
        if not call.is_complete or call.name != tool.name or _value(call.arguments) != arguments:
            return 0
    return len(parsed.calls) if len(parsed.calls) <= len(PROBE_TOOLS) else 0


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
