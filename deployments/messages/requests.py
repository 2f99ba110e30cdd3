"""The bodies of Anthropic's Messages API as this server takes them.

    implemented      model, messages, system, max_tokens, stop_sequences, temperature, top_p, top_k, stream, tools,
                     tool_choice, thinking, output_config (effort, format) and its older name output_format,
                     cache_control, diagnostics
    beyond it        what chat has: seed, min_p, repetition_penalty, presence_penalty, frequency_penalty, min_tokens,
                     ignore_eos, stop_token_ids, timeout; session_id, conversation and prompt_cache_key name the session
    rejected         blocks that are not text, tools that run on Anthropic's servers, mcp_servers
    ignored          IGNORED, and each part's own
    anything else    as in all bodies: ignored and told, or rejected with strict_parameters

null is the same as absent everywhere. Knows no HTTP library, no engine and no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.http import generation_body
from deployments.http.cache_hints import MAX_ID_CHARS, TTL_S, CacheControl, Markable, with_tools_marks
from deployments.http.function_tools import Name, Parameters, check_tools
from deployments.http.generation_body import MAX_MESSAGES, GenerationBody, StopString
from deployments.http.json_form import Schema
from deployments.http.parsing import MAX_NAME_CHARS, Body
from deployments.messages.blocks import Message, Texts, dialogue_messages, system_message
from engine.core.grammar import GrammarSpec
from engine.core.request import MAX_STOP_STRINGS, SamplingParams
from engine.dialogue import messages as dialogue
from engine.dialogue import tools as dialogue_tools
from engine.dialogue.template_values import template_kwargs
from engine.errors import InvalidParameterError
from engine.text.cache_marks import CacheWish
from engine.text.prompt import ChatPrompt

# Features of Anthropic's own service, which agents ask for whether a server has them or not.
IGNORED = generation_body.IGNORED | {
    "betas",
    "container",
    "context_management",
    "inference_geo",
    "return_token_ids",
    "speed",
    "stream_options",
    "user_profile_id",
    "workspace_id",
}
MAX_TOOLS = 512  # as agents with several servers of tools have them; their size is bounded, too
THINKS = {"enabled": True, "disabled": False}  # else as the model's template likes
MAX_EFFORT = "xhigh"  # the most that chat templates are told
TOOL_MODES = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}

ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$")]


def _check_tool_type(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "custom":
        message = "tools of type {kind} are Anthropic's own; leave it out, or offer a custom tool that does the same"
        raise PydanticCustomError("unsupported_parameter", message, {"kind": repr(kind)[:MAX_NAME_CHARS]})
    return kind


class Tool(Markable):
    """A function that the client offers."""

    ignored = frozenset({"allowed_callers", "defer_loading", "eager_input_streaming", "input_examples"})

    type: Annotated[Literal["custom"] | None, BeforeValidator(_check_tool_type)] = None
    name: ToolName
    description: str = ""
    input_schema: Parameters
    strict: bool = False

    def value(self) -> dialogue_tools.Tool:
        """As the engine takes it."""
        return dialogue_tools.Tool(self.name, self.description, self.input_schema, self.strict)


class ToolChoice(Body):
    """Whether the answer has to call something."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise PydanticCustomError("missing", "required if type is tool", {"param": "name"})
        return self

    def value(self) -> dialogue_tools.ToolChoice:
        """As the engine takes it."""
        return dialogue_tools.ToolChoice(TOOL_MODES[self.type], (self.name or "") if self.type == "tool" else "")


class Thinking(Body):
    """Whether the model is to think before it answers.

    display: with "omitted", the answer has only the signature of what was thought.
    """

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.type == "enabled" and self.budget_tokens is None:
            raise PydanticCustomError("missing", "required if type is enabled", {"param": "budget_tokens"})
        return self


class OutputFormat(Body):
    """The form of the answer: JSON by a schema, which has to be one that can be enforced."""

    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]


class OutputConfig(Body):
    """How much effort goes into the answer, and its form."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Diagnostics(Body):
    """What the request is compared with, to tell why its beginning was not cached. None = with nothing."""

    previous_message_id: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = None


class CountTokensBody(GenerationBody):
    """POST /v1/messages/count_tokens: what a prompt is made of."""

    not_implemented: ClassVar[Mapping[str, tuple[Any, ...]]] = {"mcp_servers": ([],)}
    ignored = IGNORED
    prompt_param = "messages"
    reads_answer_format = True
    clamps_max_tokens = True

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Texts = Field(default=[])
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default=[])
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: CacheControl | None = None
    diagnostics: Diagnostics | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        check_tools(self._tools(), self.chosen_calls)
        return self

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        self._grammar()  # refuses one that is too large here, where large bodies are parsed, and not in the event loop
        return self

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if not self.prompt.messages:
            message = "say nothing; add a user message with a text"
            raise PydanticCustomError("invalid", message, {"param": "messages"})
        if self.prompt.continues and self.prompt.messages[-1].tool_calls:
            message = "end with a call of a tool; add a user message with its tool_result block"
            raise PydanticCustomError("invalid", message, {"param": "messages"})
        return self

    @property
    def chosen_calls(self) -> dialogue_tools.ToolChoice:
        return dialogue_tools.AS_THE_MODEL_LIKES if self.tool_choice is None else self.tool_choice.value()

    @property
    def has_parallel_calls(self) -> bool:
        return self.tool_choice is None or not self.tool_choice.disable_parallel_tool_use

    @property
    def cache_wish(self) -> CacheWish:
        wish = super().cache_wish
        if self.diagnostics is None or self.diagnostics.previous_message_id is None:
            return wish
        return replace(wish, compared_to=self.diagnostics.previous_message_id)

    @property
    def omits_thinking(self) -> bool:
        """Whether the answer is to be without the text of what was thought."""
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def form_param(self) -> str | None:
        """Without a form of the answer, only tools make a grammar."""
        return self._stated_form_param or "tools"

    @property
    def _stated_form_param(self) -> str | None:
        if self.output_format is not None:
            return "output_format"
        return None if self.output_config is None or self.output_config.format is None else "output_config"

    def _grammar(self) -> GrammarSpec | None:
        """What the answer is held to. Raises InvalidParameterError."""
        form = self.output_format or (None if self.output_config is None else self.output_config.format)
        try:
            return None if form is None else GrammarSpec.json_schema(form.schema_, is_lenient=False)
        except InvalidParameterError as error:
            raise InvalidParameterError(error.message, self._stated_form_param) from None

    def _tools(self) -> tuple[dialogue_tools.Tool, ...]:
        return tuple(tool.value() for tool in self.tools)

    @cached_property
    def prompt(self) -> ChatPrompt:
        """An answer goes on with a last message of the assistant, if that says anything."""
        messages = list(dialogue_messages(self.messages, self.model))
        last = messages[-1]
        if last.role == "assistant" and not (last.content or last.tool_calls):
            messages.pop()
        continues = messages[-1:] == [last] and last.role == "assistant"
        if (system := system_message(self.system)) is not None:
            messages.insert(0, system)
        messages = list(with_tools_marks(messages, self.tools))
        if self.cache_control is not None and messages:  # short for a mark on the last thing that can have one
            mark = dialogue.CacheMark(ttl_s=TTL_S[self.cache_control.ttl])
            messages[-1] = replace(messages[-1], cache_marks=(*messages[-1].cache_marks, mark))
        effort = None if self.output_config is None else self.output_config.effort
        values = template_kwargs(
            {},
            reasoning_effort=MAX_EFFORT if effort == "max" else effort,
            enable_thinking=None if self.thinking is None else THINKS.get(self.thinking.type),
        )
        return ChatPrompt(tuple(messages), tools=self._tools(), template_kwargs=values, continues=continues)

    def sampling_params(self) -> SamplingParams:
        return self._sampling_params(1, None, self._grammar())

    def _sampling_params(
        self, max_tokens: int | None, logprobs: int | None, grammar: GrammarSpec | None = None
    ) -> SamplingParams:
        sampling = super()._sampling_params(max_tokens, logprobs, grammar)
        if self.thinking is None or self.thinking.budget_tokens is None:
            return sampling
        return replace(sampling, max_thinking_tokens=self.thinking.budget_tokens)


class MessagesBody(CountTokensBody):
    """POST /v1/messages. max_tokens: 0 = only have the prompt computed and cached."""

    max_tokens: Annotated[int, Field(ge=0)]
    stop: Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True, alias="stop_sequences")] = (
        Field(default=[])
    )

    @property
    def is_prewarm(self) -> bool:
        return not self.max_tokens or super().is_prewarm

    def sampling_params(self) -> SamplingParams:
        return self._sampling_params(max(1, self.max_tokens), None, self._grammar())
