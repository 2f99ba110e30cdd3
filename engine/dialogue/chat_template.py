"""From messages and tools to the text of a prompt, by the model's own chat template.

It says how the answer is to be read, too. What differs between templates is found out once, when the model is loaded: see
template_traits. For a template that knows no tools they are listed in a system message; where it writes no calls, calls and
results are written as texts in the Hermes form.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from engine.dialogue.events import parse_answer
from engine.dialogue.formats import TOOL_CALL_PARSERS, AnswerFormat
from engine.dialogue.messages import Dialogue, Message, ToolCall
from engine.dialogue.reasoning import REASONING_FORMATS, REASONING_PARSERS
from engine.dialogue.same_message import same_calls
from engine.dialogue.template_traits import PROBE_TOOLS, choose_format, choose_reasoning, probe_template
from engine.dialogue.tools import Tool
from engine.errors import ConfigError, InvalidParameterError

logger = logging.getLogger(__name__)

# The end of a prompt in which thinking is looked for if it is not known what begins an answer.
TAIL_CHARS = 64
# The end of a prompt that transformers' parser gets to see.
PROMPT_END_CHARS = 4096
HERMES_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
TOOLS_LIST = "You may call these functions:\n{tools}"


class ChatTemplate:
    """A model's chat template, and how the model writes calls and thinking. Safe in any thread once made.

    format_name, reasoning_name: what the answers are read as: one of TOOL_CALL_PARSERS and of REASONING_PARSERS, not "auto".
    reason: why, in a sentence.
    """

    def __init__(self, tokenizer: Any, *, tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> None:
        """Renders some probes with it. Raises ConfigError for an unknown parser.

        tokenizer: transformers' own, with a chat template.
        """
        for option, name, names in (
            ("tool_call_parser", tool_call_parser, TOOL_CALL_PARSERS),
            ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
        ):
            if name not in names:
                raise ConfigError(f"{option} must be one of {', '.join(names)}, got {name!r}", param=option)
        self._tokenizer = tokenizer
        self._response_template: Mapping[str, Any] | None = getattr(tokenizer, "response_template", None)
        if tool_call_parser == "response_template" and self._response_template is None:
            raise ConfigError(
                "tool_call_parser is response_template, but the model's tokenizer has none", param="tool_call_parser"
            )
        text = tokenizer.get_chat_template(tools=[PROBE_TOOLS[0].definition()])
        self.traits, found = probe_template(self._render, text)
        chosen = choose_format(tool_call_parser, self.traits, found, self._response_template is not None)
        self.format_name, self.reason, self.form = chosen.name, chosen.reason, chosen.form
        self.reasoning_name = choose_reasoning(reasoning_parser, self.traits)
        self.reasoning = REASONING_FORMATS.get(self.reasoning_name)
        logger.info("%s Thinking is read as %s.", self.reason, self.reasoning_name)

    @property
    def markers(self) -> frozenset[str] | None:
        """The texts that have to reach the parser even if they are special tokens; None = all special tokens."""
        if self.format_name == "response_template":
            return None
        texts = self.form.markers if self.form is not None else ()
        return frozenset((*texts, *(self.reasoning.markers if self.reasoning is not None else ())))

    def render(self, dialogue: Dialogue) -> str:
        """The text of a prompt.

        Raises InvalidParameterError if the template refuses the messages, or fails with them.
        """
        traits = self.traits
        messages = dialogue.messages if traits.writes_calls else _calls_as_texts(dialogue.messages)
        if not traits.takes_late_system:
            messages = _late_system_as_user(messages)
        tools = [tool.definition() for tool in dialogue.tools]
        if tools and not traits.knows_tools:
            messages = self._list_tools(messages, tools)
            tools = []
        try:
            return self._render(
                [self._message(message) for message in messages],
                tools=tools or None,
                add_generation_prompt=dialogue.opens_answer and not dialogue.continues,
                continue_final_message=dialogue.continues,
                **dialogue.template_kwargs,
            )
        except TemplateError as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise InvalidParameterError(message, param="prompt") from error
        except Exception as error:  # a template is a program: it may do with some messages what fails
            message = (
                f"the model's chat template fails with these messages ({type(error).__name__}: {error}); change them"
            )
            raise InvalidParameterError(message, param="prompt") from error

    def prompt_tail(self, prompt: str) -> str:
        """What a rendered prompt says of the answer: the end of it from the assistant's header on."""
        header = self.traits.assistant_header
        start = prompt.rfind(header) if header else -1
        return prompt[start + len(header) :] if start >= 0 else prompt[-TAIL_CHARS:]

    def thinking_state(self, prompt: str) -> str:
        """Whether the answer begins within thinking ("open"), behind it ("closed"), or may begin with it ("").

        Without a format of thinking it is "closed".
        """
        return "closed" if self.reasoning is None else self.reasoning.state_at(self.prompt_tail(prompt))

    def answer_format(self, prompt: str) -> AnswerFormat:
        """How the answer to a rendered prompt is to be read."""
        if self.format_name == "response_template":
            return AnswerFormat(response_template=self._response_template, prompt_end=prompt[-PROMPT_END_CHARS:])
        return AnswerFormat(self.form, self.reasoning, self.thinking_state(prompt))

    def is_same_answer(self, tools: Sequence[Tool], prompt: str, generated: str, written: str) -> bool:
        """Whether two texts behind a prompt are one message with calls or thinking, though they are not equal.

        Only for those: the text of an answer without them is what counts, to the last space. Nothing is the same that one of
        them leaves out, be it what was thought.

        tools: of the prompt; their schemas say whether 1.10 is a number or a text. Without any, no text is a call.
        """
        form = AnswerFormat(self.form, self.reasoning, self.thinking_state(prompt))
        answers = [parse_answer(form.parser(tools), text) for text in (generated, written)]
        if not (answers[0].calls or answers[0].reasoning) or not all(call.is_complete for call in answers[0].calls):
            return False
        one, other = ((a.content.strip(), a.reasoning.strip(), a.calls) for a in answers)
        return one[:2] == other[:2] and same_calls(one[2], other[2])

    def _render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs)
        return text

    def _message(self, message: Message) -> dict[str, Any]:
        """As the template reads it."""
        traits = self.traits
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            fields["tool_calls"] = [self._call(call) for call in message.tool_calls]
            if not message.content and not traits.has_empty_content:
                del fields["content"]
        is_shown = traits.has_reasoning_beside_content or not (message.tool_calls and message.content)
        if message.reasoning and is_shown:
            fields |= dict.fromkeys(traits.reasoning_keys, message.reasoning)
        if message.tool_call_id:
            fields["tool_call_id"] = message.tool_call_id
        if message.name:
            fields["name"] = message.name
        return fields

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments: Any = call.arguments if self.traits.has_text_arguments else _arguments_object(call.arguments)
        return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def _list_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
        """The messages with a text of ours that lists the tools."""
        form = HERMES_TOOLS if self.format_name == "hermes" else TOOLS_LIST
        listed = form.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        place = 0 if self.traits.takes_system else next((i for i, m in enumerate(messages) if m.role == "user"), 0)
        is_there = place < len(messages) and messages[place].role in ("system", "user")
        if is_there and (messages[place].role == "system" or not self.traits.takes_system):
            first = messages[place]
            parts = (first.content, listed) if first.role == "system" else (listed, first.content)
            joined = replace(first, content="\n\n".join(part for part in parts if part))
            return (*messages[:place], joined, *messages[place + 1 :])
        return (Message("system" if self.traits.takes_system else "user", listed), *messages)


def _arguments_object(text: str) -> Any:
    """The object that arguments stand for. What is none is shown to the model, for it to see its mistake."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"invalid_json": text}


def _late_system_as_user(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with system messages behind others told by the user, for a template that takes none there.

    They become a part of the user's message beside them: many such templates want the roles to alternate.
    """
    written: list[Message] = []
    is_joined = False  # the message behind a system message that was made a user's goes on with it
    for message in messages:
        is_late = message.role == "system" and any(each.role != "system" for each in written)
        if (is_late or (is_joined and message.role == "user")) and written[-1].role == "user":
            written[-1] = replace(written[-1], content=f"{written[-1].content}\n{message.content}")
        else:
            written.append(replace(message, role="user") if is_late else message)
        is_joined = is_late
    return tuple(written)


def _calls_as_texts(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with calls and results in the Hermes form, for a template that writes neither."""
    written: list[Message] = []
    for message in messages:
        if message.tool_calls:
            calls = (
                f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments or "{}"}}}\n</tool_call>'
                for call in message.tool_calls
            )
            content = "\n".join((*([message.content] if message.content else []), *calls))
            written.append(replace(message, content=content, tool_calls=()))
        elif message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if written and written[-1].role == "tool":
                written[-1] = Message("tool", f"{written[-1].content}\n{result}")
            else:
                written.append(Message("tool", result))
        else:
            written.append(message)
    return tuple(replace(message, role="user") if message.role == "tool" else message for message in written)
