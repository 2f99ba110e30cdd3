"""The bodies of OpenAI's chat and completions requests as this server takes them.

Everything in a body is done, or listed here as ignored, or named as unknown. Knows no HTTP library, no engine and no Ray.

    implemented      model, messages | prompt, max_tokens, max_completion_tokens, temperature, top_p, seed, stop,
                     stream, stream_options (include_usage, continuous_usage_stats), presence_penalty,
                     frequency_penalty, logprobs, top_logprobs, n, best_of (= n), logit_bias, echo, response_format,
                     tools, tool_choice, parallel_tool_calls, reasoning_effort
    beyond OpenAI    top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids, max_thinking_tokens,
                     return_token_ids; as vLLM has them: structured_outputs, chat_template_kwargs, prompt_logprobs,
                     skip_special_tokens, include_stop_str_in_output, add_generation_prompt,
                     continue_final_message; timeout (seconds for the
                     whole answer); prompt as token ids, or a list of prompts;
                     session_id, conversation, conversation_id and prompt_cache_key name the session
    rejected, unless *_NOT_IMPLEMENTED below, with the values that ask for nothing and therefore pass
    ignored          CHOICES_IGNORED in choices_body.py: they change nothing in the answer (labels)
    anything else    unknown: ignored by name, or rejected with strict_parameters

null is the same as absent everywhere. Roles: system, developer (the same), user, assistant, tool, function (the same).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.completions.chat_messages import (
    Message,
    NamedToolChoice,
    ToolChoice,
    ToolDefinition,
    check_continued,
    choice_as_object,
)
from deployments.completions.choices_body import CHOICES_NOT_IMPLEMENTED, MAX_N, MAX_PROMPTS, ChoicesBody
from deployments.generation import ErrorItem
from deployments.http.cache_hints import with_tools_marks
from deployments.http.function_tools import MAX_TOOLS, check_tools
from deployments.http.generation_body import MAX_MESSAGES, TemplateKwargs, TokenId, TokenLimit, as_limit
from engine.core.request import MAX_LOGPROBS, SamplingParams
from engine.dialogue import tools as dialogue_tools
from engine.dialogue.template_values import template_kwargs
from engine.text.prompt import ChatPrompt, TextPrompt, TokenPrompt

CHAT_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = CHOICES_NOT_IMPLEMENTED | {
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
}
MAX_TOLD_CHARS = 1 << 20  # of several prompts, or token ids, times the log-probabilities for each
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


def _prompt_list(prompt: Any) -> Any:
    """A text or token ids is short for a list of one."""
    prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else [prompt]
    if len(prompts) > MAX_PROMPTS:
        raise PydanticCustomError("invalid", f"must be at most {MAX_PROMPTS} prompts")
    are_texts = all(isinstance(each, str) for each in prompts)
    if not are_texts and not all(isinstance(each, list) for each in prompts):
        raise PydanticCustomError("invalid", "must be a string, a list of token ids, or a list of either")
    if not are_texts and not all(type(i) is int and i >= 0 for ids in prompts for i in ids):
        raise PydanticCustomError("invalid", "must have integers of at least 0 as its token ids")
    if not all(prompts):
        raise PydanticCustomError("invalid", "must not be empty")
    return prompts


def _check_suffix(suffix: Any) -> Any:
    if suffix not in (None, ""):
        message = (
            "not supported; write the text around the gap into the prompt, with the model's own tokens for filling in"
        )
        raise PydanticCustomError("unsupported_parameter", message)
    return suffix


class ChatCompletionBody(ChoicesBody):
    """POST /v1/chat/completions."""

    not_implemented = CHAT_NOT_IMPLEMENTED
    prompt_param = "messages"
    reads_answer_format = True

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: TokenLimit = None
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default=[])
    tool_choice: Annotated[
        ToolChoice | None,
        BeforeValidator(
            choice_as_object, json_schema_input_type=Literal["auto", "none", "required"] | NamedToolChoice | None
        ),
    ] = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateKwargs = Field(default={})
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("invalid", "only allowed when logprobs is true", {"param": "top_logprobs"})
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "invalid", "conflicts with max_completion_tokens; give only one of them", {"param": "max_tokens"}
            )
        return self

    @model_validator(mode="after")
    def _check_continued(self) -> Self:
        if self.continue_final_message:
            check_continued(self.messages, opens_answer=self.add_generation_prompt)
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        check_tools(self._tools(), self.chosen_calls)
        return self

    @property
    def chosen_calls(self) -> dialogue_tools.ToolChoice:
        return dialogue_tools.AS_THE_MODEL_LIKES if self.tool_choice is None else self.tool_choice.value()

    @property
    def has_parallel_calls(self) -> bool:
        return self.parallel_tool_calls

    @property
    def form_param(self) -> str | None:
        """Without a form of the answer, only tools make a grammar."""
        return super().form_param or "tools"

    def _tools(self) -> tuple[dialogue_tools.Tool, ...]:
        return tuple(tool.value() for tool in self.tools)

    def prompt_value(self) -> ChatPrompt:
        """Raises InvalidParameterError."""
        values = template_kwargs(
            self.chat_template_kwargs,
            reasoning_effort=self.reasoning_effort,
            enable_thinking=None if self.reasoning_effort is None else self.reasoning_effort != "none",
        )
        messages = with_tools_marks([message.value() for message in self.messages], self.tools)
        return ChatPrompt(
            messages,
            tools=self._tools(),
            template_kwargs=values,
            continues=self.continue_final_message,
            opens_answer=self.add_generation_prompt is not False,
        )

    @property
    def prompts(self) -> tuple[ChatPrompt, ...]:
        """Raises InvalidParameterError."""
        return (self.prompt_value(),)

    def sampling_params(self) -> SamplingParams:
        max_tokens = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling_params(max_tokens, logprobs, self._grammar())


TokenIds = Annotated[list[TokenId], Field(min_length=1)]
PromptText = Annotated[str, Field(min_length=1)]
PromptInput = (
    PromptText
    | TokenIds
    | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionBody(ChoicesBody):
    """POST /v1/completions."""

    not_implemented = CHOICES_NOT_IMPLEMENTED
    prompt_param = "prompt"

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompt_list, json_schema_input_type=PromptInput)]
    max_tokens: Annotated[int, Field(ge=-1)] | None = None  # None means another number here, so -1 has to stay
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    echo: bool = False
    suffix: Annotated[Literal[""] | None, BeforeValidator(_check_suffix)] = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.n):
            message = "must be equal to n: all answers are returned, and choosing among them is left to the client"
            raise PydanticCustomError("invalid", message, {"param": "best_of"})
        return self

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            message = "must be at least 1, unless echo is true: nothing would be returned"
            raise PydanticCustomError("invalid", message, {"param": "max_tokens"})
        num_told = 0 if self.num_prompt_logprobs is None else 1 + self.num_prompt_logprobs
        if len(self.prompt) > 1 and num_told * sum(map(len, self.prompt)) > MAX_TOLD_CHARS:
            most = MAX_TOLD_CHARS // num_told
            message = f"must have at most {most} characters or token ids together, with so many log-probabilities each"
            raise PydanticCustomError("invalid", message, {"param": "prompt"})
        return self

    def in_own_words(self, error: ErrorItem) -> ErrorItem:
        if error.param == "prompt_logprobs" and self.prompt_logprobs is None:
            return replace(error, param="logprobs")
        return super().in_own_words(error)

    @property
    def shows_prompt(self) -> bool:
        return self.echo

    @property
    def num_prompt_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        return max((num for num in (self.prompt_logprobs, echoed) if num is not None), default=None)

    @property
    def num_answer_tokens(self) -> int | None:
        """None = what the window leaves. 0 = only the prompt is wanted; the engine makes a token, which is left out."""
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else as_limit(self.max_tokens)

    @property
    def prompts(self) -> tuple[TextPrompt | TokenPrompt, ...]:
        return tuple(
            TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(tuple(prompt)) for prompt in self.prompt
        )

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    def sampling_params(self) -> SamplingParams:
        max_tokens = 1 if self.num_answer_tokens == 0 else self.num_answer_tokens
        return self._sampling_params(max_tokens, self.logprobs, self._grammar())
