"""What the bodies of all endpoints that generate have in common, and the one way to a request for the engine.

Each endpoint adds its prompt and names a few parameters in its own words. Knows no HTTP library and no Ray.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from deployments.generation import ErrorItem, GenerationRequest
from deployments.http.cache_hints import PromptCacheOptions, wish_of
from deployments.http.parsing import MAX_NAME_CHARS, Body
from deployments.origin import NO_ORIGIN, Origin
from engine.core.grammar import GrammarSpec
from engine.core.request import MAX_STOP_CHARS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingParams
from engine.dialogue.tools import AS_THE_MODEL_LIKES, Tool, ToolChoice
from engine.tenant import Tenant
from engine.text.cache_marks import CacheWish
from engine.text.prompt import Prompt
from engine.text.transcript import Transcript

# What changes no answer: labels for a service's own books; hints about speed; and verbosity, which models learn from their
# prompts. docs/http_api.md has them one by one.
IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "priority",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
MAX_SESSION_KEY_CHARS = 512
MAX_MESSAGES = 8192  # or items, or parts of the content of one
MAX_TEMPLATE_VALUES = 32

TokenId = Annotated[int, Field(ge=0)]
SessionKey = Annotated[str, Field(max_length=MAX_SESSION_KEY_CHARS)]
TemplateKwargs = Annotated[
    dict[Annotated[str, Field(max_length=MAX_NAME_CHARS)], Any], Field(max_length=MAX_TEMPLATE_VALUES)
]


def as_limit(max_tokens: Any) -> Any:
    """-1 is how several servers write that there is no limit."""
    return None if type(max_tokens) is int and max_tokens == -1 else max_tokens


TokenLimit = Annotated[
    Annotated[int, Field(ge=1)] | None,
    BeforeValidator(as_limit, json_schema_input_type=Annotated[int, Field(ge=1)] | Literal[-1] | None),
]


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class StreamOptions(Body):
    ignored = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Conversation(Body):
    id: SessionKey


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]


class GenerationBody(Body):
    """What all endpoints that generate share. The ranges are those of SamplingParams, repeated for the served document."""

    ignored = IGNORED
    reads_answer_format: ClassVar[bool] = False  # the answer is taken apart into content, thinking and calls
    clamps_max_tokens: ClassVar[bool] = False  # to what the window leaves
    prompt_param: ClassVar[str]  # this endpoint's name for what the engine calls `prompt`

    model: str
    max_tokens: TokenLimit = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[str],
        Field(fail_fast=True),
        BeforeValidator(_as_list, json_schema_input_type=StopString | StopStrings),
    ] = Field(default=[])
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] = Field(default=[])
    max_thinking_tokens: Annotated[int, Field(ge=0)] | None = None
    return_token_ids: bool = False
    session_id: SessionKey | None = None
    conversation: Annotated[
        Conversation | None,
        BeforeValidator(
            lambda value: {"id": value} if isinstance(value, str) else value,
            json_schema_input_type=SessionKey | Conversation | None,
        ),
    ] = None
    prompt_cache_key: SessionKey | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    explain: bool = False
    _origin: Origin = PrivateAttr(default=NO_ORIGIN)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid", "only allowed when stream is true", {"param": "stream_options"})
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def note_origin(self, origin: Origin) -> None:
        """What is known of the request that this is the body of."""
        self._origin = origin

    def generation_request(
        self,
        prompt: Prompt,
        *,
        request_id: str,
        session_id: str,
        tenant: Tenant,
        history: Transcript | None = None,
        returns_transcript: bool = False,
    ) -> GenerationRequest:
        """What the engine is asked; every endpoint that generates makes it here. Raises InvalidParameterError.

        session_id: what the request is routed by.
        history, returns_transcript: see GenerationRequest.
        """
        return GenerationRequest(
            request_id=request_id,
            session_id=session_id,
            prompt=prompt,
            sampling=self.sampling_params(),
            stream=self.stream,
            return_prompt_token_ids=self.return_token_ids,
            return_answer_format=self.reads_answer_format,
            tool_choice=self.chosen_calls,
            has_parallel_calls=self.has_parallel_calls,
            tenant=tenant,
            history=history,
            returns_transcript=returns_transcript,
            clamps_max_tokens=self.clamps_max_tokens,
            cache_wish=self.cache_wish,
            prewarms=self.is_prewarm,
            explains_misses=self.cache_wish.compared_to is not None,
            explains=self.explain or self._origin.explains,
            log_id=self._origin.request_id,
            model=self.model,
            origin=self._origin,
        )

    @property
    def cache_wish(self) -> CacheWish:
        """What is to become of the context in the cache, besides what is marked in messages."""
        return wish_of(self.prompt_cache_options, self.prompt_cache_retention)

    @property
    def is_prewarm(self) -> bool:
        """Whether the prompt is only to be cached, and no answer is wanted."""
        return self.prompt_cache_options is not None and self.prompt_cache_options.prewarm

    @property
    def num_choices(self) -> int:
        """How many answers are asked for."""
        return 1

    @property
    def chosen_calls(self) -> ToolChoice:
        """Whether the answer has to call something."""
        return AS_THE_MODEL_LIKES

    @property
    def offered_tools(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        return self.chosen_calls.offered(self._tools())

    def _tools(self) -> tuple[Tool, ...]:
        """The tools of the request."""
        return ()

    @property
    def has_parallel_calls(self) -> bool:
        """Whether the answer may make several calls."""
        return True

    @abstractmethod
    def sampling_params(self) -> SamplingParams:
        """How to sample, in the engine's words. Raises InvalidParameterError for a value out of range."""

    def in_own_words(self, error: ErrorItem) -> ErrorItem:
        """The same error, whose `param` is this endpoint's name for it and not the engine's."""
        own = {"prompt": self.prompt_param, "grammar": self.form_param}
        return replace(error, param=own[error.param]) if error.param in own else error

    @property
    def form_param(self) -> str | None:
        """This request's name for what the engine calls `grammar`; None = it asks for none."""
        return None

    def _sampling_params(
        self, max_tokens: int | None, logprobs: int | None, grammar: GrammarSpec | None = None
    ) -> SamplingParams:
        """Raises InvalidParameterError for a value out of range.

        grammar: what the answer is held to; None = any text.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,  # -1 = off, as vLLM says it
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            grammar=grammar,
            max_thinking_tokens=self.max_thinking_tokens,
        )
