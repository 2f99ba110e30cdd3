"""The bodies and query strings of OpenAI's Responses and Conversations API as this server takes them.

As in completions/requests.py, everything in a body is done, or rejected with the name of the parameter, or stands among
what is ignored. Knows no HTTP library, no store, no engine, no Ray. Items are in items.py, tools in tools.py.

    implemented      model, input, previous_response_id, conversation, store, instructions, metadata, stream,
                     max_output_tokens, temperature, top_p, truncation, tools, tool_choice, parallel_tool_calls,
                     text.format, reasoning.effort
    beyond OpenAI    what chat has: top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed,
                     stop, stop_token_ids, min_tokens, ignore_eos, max_thinking_tokens, chat_template_kwargs,
                     session_id; prompt_cache_key names the session
    rejected, unless *_NOT_IMPLEMENTED below, with the values that ask for nothing and therefore pass
    ignored          RESPONSE_IGNORED below; what only concerns OpenAI's own models and tools and is repeated in the
                     answer: max_tool_calls, service_tier, text.verbosity, reasoning.summary, and INCLUDABLE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from deployments.http.function_tools import check_tools
from deployments.http.generation_body import GenerationBody, SessionKey, StreamOptions, TemplateKwargs, TokenLimit
from deployments.http.json_form import JsonSchemaFormat
from deployments.http.parsing import Body, validated_within
from deployments.responses.input_items import (
    NOTHING,
    SomeItems,
    last_answer_id,
    new_items,
    referenced_ids,
    tells_history,
    text_or,
)
from deployments.responses.items import ItemJson, NewId, messages_of
from deployments.responses.labels import Include, Metadata
from deployments.responses.tools import AnyToolChoice, SomeTools, choice_value
from engine.core.grammar import GrammarSpec
from engine.core.request import SamplingParams
from engine.dialogue import tools as dialogue_tools
from engine.dialogue.template_values import template_kwargs
from engine.errors import InvalidParameterError
from engine.text.prompt import ChatPrompt

RESPONSE_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "access_programs": ({},),
    "background": (False,),
    "background_options": ({},),
    "context_management": ([],),
    "image": ({},),
    "moderation": (),
    "prompt": (),
    "top_logprobs": (0,),
    # Chat's words for what is named otherwise here, or not there.
    "max_tokens": (),
    "max_completion_tokens": (),
    "messages": (),
    "n": (1,),
    "response_format": (),
    "return_token_ids": (False,),
}
RESPONSE_IGNORED = frozenset({"safety_identifier", "user"})
REASONING_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {"context": ("auto",), "mode": ("standard",)}
STREAM_OPTIONS_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {"continuous_usage_stats": (False,)}


class TextFormat(Body):
    """The form of the answer's text, if it is not a schema's."""

    type: Literal["text", "json_object"]


class JsonSchemaTextFormat(JsonSchemaFormat):
    """A schema that the answer's text is to match."""

    type: Literal["json_schema"]


PLAIN_TEXT = TextFormat(type="text")


def _as_format(value: Any, info: ValidationInfo) -> Any:
    """By its type alone, so that an error is about that kind."""
    is_schema = isinstance(value, dict) and value.get("type") == "json_schema"
    return validated_within(JsonSchemaTextFormat if is_schema else TextFormat, value, info)


class TextConfig(Body):
    """What the answer's text is to be like. verbosity: the models here have no such setting."""

    format: Annotated[
        TextFormat | JsonSchemaTextFormat | None,
        BeforeValidator(_as_format, json_schema_input_type=TextFormat | JsonSchemaTextFormat | None),
    ] = None
    verbosity: Literal["low", "medium", "high"] = "medium"

    def grammar(self) -> GrammarSpec | None:
        """What the answer is held to; None = any text. Raises InvalidParameterError."""
        if isinstance(self.format, JsonSchemaTextFormat):
            return self.format.grammar()
        return GrammarSpec.json_object() if self.format is not None and self.format.type == "json_object" else None


class Reasoning(Body):
    """How the model is to think. summary: thinking is shown as it is, and nothing summarises it."""

    not_implemented = REASONING_NOT_IMPLEMENTED

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(StreamOptions):
    """include_usage: usage comes with every response, whole or streamed."""

    not_implemented = STREAM_OPTIONS_NOT_IMPLEMENTED


class ResponseBody(GenerationBody):
    """POST /v1/responses, and /v1/responses/input_tokens, which counts what this would read."""

    not_implemented = RESPONSE_NOT_IMPLEMENTED
    ignored = RESPONSE_IGNORED
    prompt_param = "input"
    reads_answer_format = True

    input: Annotated[SomeItems, text_or(SomeItems)]
    previous_response_id: SessionKey | None = None
    store: bool = True
    instructions: str | None = None
    metadata: Metadata = Field(default_factory=dict)
    max_output_tokens: TokenLimit = None
    truncation: Literal["disabled", "auto"] = "disabled"
    stream_options: ResponseStreamOptions | None = None
    tools: SomeTools = Field(default=[])
    tool_choice: AnyToolChoice = "auto"
    parallel_tool_calls: bool = True
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    include: Include = Field(default_factory=list)
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: TemplateKwargs = Field(default={})
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None

    @model_validator(mode="after")
    def _check_one_history(self) -> Self:
        if self.previous_response_id is not None and self.conversation is not None:
            raise PydanticCustomError(
                "mutually_exclusive_parameters",
                "cannot be combined with conversation; give only one of them",
                {"param": "previous_response_id"},
            )
        return self

    @model_validator(mode="after")
    def _check_answer(self) -> Self:
        check_tools(self._tools(), self.chosen_calls)
        self._grammar()  # refuses one that is too large here, where large bodies are parsed, and not in the event loop
        return self

    @property
    def conversation_id(self) -> str | None:
        return None if self.conversation is None else self.conversation.id

    @property
    def is_continued(self) -> bool:
        """Whether the server keeps what came before."""
        return self.previous_response_id is not None or self.conversation is not None

    @property
    def referenced_ids(self) -> tuple[str, ...]:
        """The items of the store that the input refers to."""
        return referenced_ids(self.input)

    @property
    def tells_history(self) -> bool:
        """Whether the input says what was answered before, and not only what is new."""
        return tells_history(self.input)

    @property
    def last_answer_id(self) -> str | None:
        """What the client says is the id of the last item that was answered."""
        return last_answer_id(self.input)

    def input_items(self, new_id: NewId, stored: Mapping[str, ItemJson] = NOTHING) -> tuple[ItemJson, ...]:
        """The new input alone, each item with an id of its own. stored: what it refers to, by id."""
        return new_items(self.input, new_id, stored)

    @property
    def chosen_calls(self) -> dialogue_tools.ToolChoice:
        return choice_value(self.tool_choice)

    @property
    def has_parallel_calls(self) -> bool:
        return self.parallel_tool_calls

    @property
    def form_param(self) -> str | None:
        return "tools" if self._grammar() is None else "text.format"

    def _tools(self) -> tuple[dialogue_tools.Tool, ...]:
        return tuple(tool.value() for tool in self.tools)

    def _grammar(self) -> GrammarSpec | None:
        """What the answer's text is held to. Raises InvalidParameterError."""
        try:
            return None if self.text is None else self.text.grammar()
        except InvalidParameterError as error:
            raise InvalidParameterError(error.message, "text.format") from None

    def prompt_value(self, items: Sequence[ItemJson]) -> ChatPrompt:
        """What the engine is given. Raises InvalidParameterError.

        items: the whole history, and the input.
        """
        effort = None if self.reasoning is None else self.reasoning.effort
        values = template_kwargs(
            self.chat_template_kwargs,
            reasoning_effort=effort,
            enable_thinking=None if effort is None else effort != "none",
        )
        return ChatPrompt(
            messages_of(items, self.instructions),
            drops_oldest=self.truncation == "auto",
            tools=self._tools(),
            template_kwargs=values,
        )

    def shown(self) -> dict[str, Any]:
        """How the answer was to be made, as the response repeats it."""
        text, thinking, choice = self.text or TextConfig(), self.reasoning or Reasoning(), self.tool_choice
        return {
            "tools": [tool.shown() for tool in self.tools],
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "text": {"format": (text.format or PLAIN_TEXT).model_dump(by_alias=True), "verbosity": text.verbosity},
            "reasoning": {"effort": thinking.effort, "summary": thinking.summary or thinking.generate_summary},
        }

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidParameterError for a value out of range."""
        return self._sampling_params(self.max_output_tokens, None, self._grammar())
