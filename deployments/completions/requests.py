"""The bodies of OpenAI's chat and completions requests as this server takes them.

Everything in a body is done, or rejected with the name of the parameter. Knows no HTTP library, no engine and no Ray.

    implemented      model, messages | prompt, max_tokens, max_completion_tokens, temperature, top_p, seed, stop,
                     stream, stream_options (include_usage, continuous_usage_stats), presence_penalty,
                     frequency_penalty, logprobs, top_logprobs, response_format
    beyond OpenAI    top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids,
                     return_token_ids; structured_outputs, as vLLM has it; timeout (seconds for the
                     whole answer); prompt as token ids;
                     session_id, conversation and prompt_cache_key name the session
    rejected, unless *_NOT_IMPLEMENTED below, with the values that ask for nothing and therefore pass
    ignored          IGNORED in http/generation_body.py: they ask for nothing of the answer (labels, obfuscation) or
                     concern only what is rejected anyway (parallel_tool_calls without tools)
    anything else    rejected as unknown

null is the same as absent everywhere. Roles: system, developer (the same), user, assistant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.completions.answer_forms import FormedBody
from deployments.http.generation_body import MAX_MESSAGES, TokenId
from deployments.http.parsing import Body
from engine.core.request import MAX_LOGPROBS, SamplingParams
from engine.dialogue.messages import Dialogue
from engine.text.prompt import ChatPrompt, TextPrompt, TokenPrompt

NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
CHAT_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = NOT_IMPLEMENTED | {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
COMPLETION_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = NOT_IMPLEMENTED | {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
MESSAGE_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    # What OpenAI's client puts in an assistant message that is sent back as it came.
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


def _joined_text(content: Any) -> Any:
    """A list of text parts as one text; everything else is for pydantic to judge."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "unsupported_parameter",
                'only {"type": "text", "text": ...} parts are supported',
                {"param": index},
            )
        texts.append(part["text"])
    return "".join(texts)


def _one_prompt(prompt: Any) -> Any:
    """A text or token ids; a batch of one is the same as the one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise PydanticCustomError(
                "unsupported_parameter", "several prompts in one request are not supported; send one request for each"
            )
        prompt = prompt[0]
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(i) is int and i >= 0 for i in prompt)):
        return prompt
    raise PydanticCustomError("invalid", "must be a string or a list of token ids (integers of at least 0)")


class ChatTextPart(BaseModel):  # for the served document; _joined_text takes these apart
    type: Literal["text"]
    text: str


class Message(Body):
    not_implemented = MESSAGE_NOT_IMPLEMENTED

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_text, json_schema_input_type=str | list[ChatTextPart])]


class ChatCompletionBody(FormedBody):
    """POST /v1/chat/completions."""

    not_implemented = CHAT_NOT_IMPLEMENTED
    prompt_param = "messages"

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
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

    def prompt_value(self) -> ChatPrompt:
        role_of = {"developer": "system"}
        return ChatPrompt(Dialogue.of([(role_of.get(m.role, m.role), m.content) for m in self.messages]).messages)

    def sampling_params(self) -> SamplingParams:
        max_tokens = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling_params(max_tokens, logprobs, self._grammar())


TokenIds = Annotated[list[TokenId], Field(min_length=1)]
PromptText = Annotated[str, Field(min_length=1)]
PromptInput = (
    PromptText
    | TokenIds
    | Annotated[list[PromptText], Field(min_length=1, max_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=1)]
)


class CompletionBody(FormedBody):
    """POST /v1/completions."""

    not_implemented = COMPLETION_NOT_IMPLEMENTED
    prompt_param = "prompt"

    prompt: Annotated[
        str | list[int], Field(min_length=1), BeforeValidator(_one_prompt, json_schema_input_type=PromptInput)
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def prompt_value(self) -> TextPrompt | TokenPrompt:
        return TextPrompt(self.prompt) if isinstance(self.prompt, str) else TokenPrompt(tuple(self.prompt))

    def sampling_params(self) -> SamplingParams:
        return self._sampling_params(
            COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens, self.logprobs, self._grammar()
        )
