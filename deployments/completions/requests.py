"""The bodies of OpenAI's requests as this server takes them. `parse_request` gives a valid one or says what
is wrong with which parameter; nothing is accepted and then not done. Knows no HTTP library, no engine, no
Ray.

    implemented      model, messages | prompt, max_tokens, max_completion_tokens, temperature, top_p, seed, stop,
                     stream, stream_options (include_usage, continuous_usage_stats), presence_penalty,
                     frequency_penalty, logprobs, top_logprobs
    beyond OpenAI    top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids,
                     return_token_ids; timeout (seconds for the whole answer); prompt as token ids;
                     session_id, conversation and prompt_cache_key name the session
    refused, unless  *_NOT_IMPLEMENTED below, with the values that ask for nothing and therefore pass
    ignored          IGNORED below: they ask for nothing of the answer (labels, obfuscation) or concern only what
                     is refused anyway (parallel_tool_calls without tools)
    anything else    refused as unknown

null is the same as absent everywhere. Roles: system, developer (the same), user, assistant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, from_json

from engine.core.request import MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingParams
from engine.errors import RequestError
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
    "response_format": ({"type": "text"},),
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
IGNORED = frozenset({"metadata", "parallel_tool_calls", "prompt_cache_retention", "safety_identifier", "user"})

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_SESSION_KEY_CHARS = 512
# Bounds on what a body is made of: each part becomes an object of some hundred bytes, and most parts have one byte or two.
MAX_PARTS = 100_000  # lists, objects and fields in a whole body
MAX_FIELDS = 128  # of one object: each unknown one would become an error
MAX_MESSAGES = 8192  # or items, or parts of the content of one

TokenId = Annotated[int, Field(ge=0)]
SessionKey = Annotated[str, Field(max_length=MAX_SESSION_KEY_CHARS)]


class BadRequestError(RequestError):
    """The body of a request is wrong; `code` is OpenAI's word for how."""

    def __init__(self, message: str, param: str | None, code: str | None) -> None:
        super().__init__(message, param)
        self.code = code


class Body(BaseModel):
    """Strict, closed, immutable. Subclasses say which parameters they know and do not implement."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    not_implemented: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise PydanticCustomError("invalid", f"an object has at most {MAX_FIELDS} fields here")
        for name, neutral in cls.not_implemented.items():
            if not _is_neutral(data.get(name), neutral):
                passing = "".join(f" or {value!r}" for value in neutral)
                raise PydanticCustomError(
                    "unsupported_parameter",
                    f"not implemented here; leave it out (null{passing} passes)",
                    {"param": name},
                )
        known_none = {name for name, value in data.items() if value is None and name in cls.model_fields}
        return {
            name: value
            for name, value in data.items()
            if name not in cls.not_implemented and name not in cls.ignored and name not in known_none
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """For the served document: what _sort_out lets pass, besides the fields."""
        schema = handler(core_schema)
        whole = handler.resolve_ref_schema(schema)
        fields = whole.get("properties", {})
        known: dict[str, Any] = {
            name: field
            if name in whole.get("required", ()) or {"type": "null"} in field.get("anyOf", ())
            else _or_null(field)
            for name, field in fields.items()
        }
        for name, neutral in cls.not_implemented.items():
            known[name] = {"enum": [None, *neutral], "description": "not implemented; these values ask for nothing"}
        for name in sorted(cls.ignored):
            known[name] = {"description": "ignored"}
        whole["properties"] = known
        return schema


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    default = {"default": field["default"]} if "default" in field else {}
    return {"anyOf": [{name: value for name, value in field.items() if name != "default"}, {"type": "null"}], **default}


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # True == 1, but {"n": true} is a mistake.
    return value is None or any(type(value) is type(other) and value == other for other in neutral)


def _joined_text(content: Any) -> Any:
    """A list of text parts as one text; everything else is for pydantic to judge."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "unsupported_parameter",
                'only {"type": "text", "text": ...} parts are implemented here',
                {"param": index},
            )
        texts.append(part["text"])
    return "".join(texts)


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _one_prompt(prompt: Any) -> Any:
    """A text or token ids; a batch of one is the same as the one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise PydanticCustomError(
                "unsupported_parameter", "several prompts in one request are not implemented here"
            )
        prompt = prompt[0]
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(i) is int and i >= 0 for i in prompt)):
        return prompt
    raise PydanticCustomError("invalid", "must be a text or a list of token ids (integers of at least 0)")


class ChatTextPart(BaseModel):  # for the served document; _joined_text takes these apart
    type: Literal["text"]
    text: str


class Message(Body):
    not_implemented = MESSAGE_NOT_IMPLEMENTED

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_text, json_schema_input_type=str | list[ChatTextPart])]


class StreamOptions(Body):
    ignored = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Conversation(Body):
    id: SessionKey


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]


class GenerationBody(Body):
    """What all endpoints that generate share. The ranges are those of SamplingParams, said here too for the document."""

    ignored = IGNORED

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[str],
        Field(fail_fast=True),
        BeforeValidator(_as_list, json_schema_input_type=StopString | StopStrings),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] = []
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
    timeout: Annotated[float, Field(gt=0)] | None = None

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

    def _sampling_params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidParameterError for a value out of range."""
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
        )


class ChatCompletionBody(GenerationBody):
    """POST /v1/chat/completions."""

    not_implemented = CHAT_NOT_IMPLEMENTED

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
                "invalid", "max_completion_tokens says otherwise; give one of them", {"param": "max_tokens"}
            )
        return self

    def prompt_value(self) -> ChatPrompt:
        role_of = {"developer": "system"}
        return ChatPrompt(tuple((role_of.get(m.role, m.role), m.content) for m in self.messages))

    def sampling_params(self) -> SamplingParams:
        max_tokens = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return self._sampling_params(max_tokens, (self.top_logprobs or 0) if self.logprobs else None)


TokenIds = Annotated[list[TokenId], Field(min_length=1)]
PromptText = Annotated[str, Field(min_length=1)]
PromptInput = (
    PromptText
    | TokenIds
    | Annotated[list[PromptText], Field(min_length=1, max_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=1)]
)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    not_implemented = COMPLETION_NOT_IMPLEMENTED

    prompt: Annotated[
        str | list[int], Field(min_length=1), BeforeValidator(_one_prompt, json_schema_input_type=PromptInput)
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def prompt_value(self) -> TextPrompt | TokenPrompt:
        return TextPrompt(self.prompt) if isinstance(self.prompt, str) else TokenPrompt(tuple(self.prompt))

    def sampling_params(self) -> SamplingParams:
        return self._sampling_params(
            COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens, self.logprobs
        )


BodyT = TypeVar("BodyT", ChatCompletionBody, CompletionBody)
AnyBodyT = TypeVar("AnyBodyT", bound=Body)
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "mutually_exclusive_parameters": "mutually_exclusive_parameters",
    "unsupported_parameter": "unsupported_parameter",
}
_REASONS = {"extra_forbidden": "unknown parameter", "model_type": "must be an object"}
MAX_NAME_CHARS = 64


def parse_request(kind: type[AnyBodyT], raw: bytes) -> tuple[AnyBodyT, dict[str, Any]]:
    """The request, and the plain data that it was made of. Raises BadRequestError for the first thing that is wrong."""
    if _num_parts(raw) > MAX_PARTS:
        raise BadRequestError(f"the body has more than {MAX_PARTS} lists, objects and fields", None, "invalid_value")
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON in UTF-8: {error}", None, None) from None
    if not isinstance(data, dict):
        raise BadRequestError("the body must be a JSON object", None, None)
    return validated(kind, data), data


_ALL_BUT_MARKS = bytes(set(range(256)) - set(b'"[{:'))


def _num_parts(raw: bytes) -> int:
    """Lists, objects and fields in a JSON text, told from what is in its strings; not exact while they are few. Linear, and
    makes no object of any of them."""
    if sum(map(raw.count, (b"[", b"{", b":"))) <= MAX_PARTS:
        return 0
    marks = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _ALL_BUT_MARKS)
    return sum(map(len, marks.split(b'"')[::2]))  # every other piece is what a string holds


def validated(kind: type[AnyBodyT], data: dict[str, Any]) -> AnyBodyT:
    """Raises BadRequestError for the first thing that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False, include_input=False)[0]) from None


def _bad_request(error: ErrorDetails) -> BadRequestError:
    inner = error.get("ctx", {}).get("param")
    param = ""
    for step in (*error["loc"], *(() if inner is None else (inner,))):
        name = str(step)[:MAX_NAME_CHARS]
        param += f"[{name}]" if isinstance(step, int) else f".{name}" if param else name
    reason = _REASONS.get(error["type"], error["msg"])
    code = _CODES.get(error["type"], "invalid_value")
    return BadRequestError(f"{param}: {reason}" if param else reason, param or None, code)
