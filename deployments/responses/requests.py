"""The bodies and query strings of OpenAI's Responses and Conversations API as this server takes them.

And the message items that its state is made of. As in completions/requests.py, everything in a body is done, or
rejected with the name of the parameter. Knows no HTTP library, no store, no engine, no Ray.

    implemented      model, input, previous_response_id, conversation, store, instructions, metadata, stream,
                     max_output_tokens, temperature, top_p, truncation
    beyond OpenAI    what chat has: top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed,
                     stop, stop_token_ids, min_tokens, ignore_eos, max_thinking_tokens, session_id; prompt_cache_key names the
                     session
    rejected, unless RESPONSE_NOT_IMPLEMENTED below, with the values that ask for nothing and therefore pass;
                     tool_choice, include, text and reasoning are looked into
    ignored          RESPONSE_IGNORED below; parallel_tool_calls is only repeated in the answer

An item is a dict as OpenAI's API shows it: {"type": "message", "id", "status", "role", "content": parts}. What comes in
gets a new id; its parts are input_text, or output_text in an assistant message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from deployments.http.generation_body import MAX_MESSAGES, GenerationBody, SessionKey, StreamOptions
from deployments.http.parsing import MAX_NAME_CHARS, Body, Query
from engine.core.request import SamplingParams

RESPONSE_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "access_programs": ({},),
    "background": (False,),
    "background_options": ({},),
    "context_management": ([],),
    "image": ({},),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "top_logprobs": (0,),
    # Chat's words for what is named otherwise here, or not there.
    "max_tokens": (),
    "max_completion_tokens": (),
    "messages": (),
    "n": (1,),
    "response_format": (),
    "return_token_ids": (False,),
}
RESPONSE_IGNORED = frozenset({"prompt_cache_retention", "safety_identifier", "user"})
TEXT_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {"format": ({"type": "text"},), "verbosity": ("medium",)}
REASONING_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "context": ("auto",),
    "effort": ("none",),
    "generate_summary": (),
    "mode": ("standard",),
    "summary": (),
}
CACHE_OPTIONS_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "comparison_response_id": (),
    "mode": ("implicit",),
    "prewarm": (False,),
    "ttl": ("30m",),
}
ITEM_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {"phase": ("final_answer",)}
PART_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {"annotations": ([],), "logprobs": ([],)}
# Usage comes with every response, whole or streamed.
STREAM_OPTIONS_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {"include_usage": (), "continuous_usage_stats": ()}
QUERY_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {"include": (), "include[]": ()}
# A stored response is not streamed again.
RETRIEVE_NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    **QUERY_NOT_IMPLEMENTED,
    "starting_after": (),
    "stream": ("false",),
}
MAX_ITEMS = 20  # that one request may add to a conversation
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512

ItemJson = dict[str, Any]


def _unsupported(message: str, **param: int) -> PydanticCustomError:
    return PydanticCustomError("unsupported_parameter", message, param or None)


def _only(*passing: str) -> BeforeValidator:
    """Other values are known to OpenAI's API, or may be one day: not implemented rather than invalid."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in passing:
            return value
        name = repr(value)[:MAX_NAME_CHARS]
        raise _unsupported(f"{name} is not supported; supported: {', '.join(map(repr, passing))}")

    return BeforeValidator(check)


def _nothing_included(include: Any) -> Any:
    if isinstance(include, list) and include:
        raise _unsupported(f"{repr(include[0])[:MAX_NAME_CHARS]} is not supported; omit it, or give []", param=0)
    return include


def _check_few_pairs(metadata: Any) -> Any:
    """Before their values are looked at: each wrong one would become an error."""
    if isinstance(metadata, dict) and len(metadata) > MAX_METADATA_PAIRS:
        raise PydanticCustomError("invalid", f"at most {MAX_METADATA_PAIRS} pairs")
    return metadata


def _check_metadata(metadata: dict[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY_CHARS:
            message = f"a key has at most {MAX_METADATA_KEY_CHARS} characters"
            raise PydanticCustomError("invalid", message, {"param": key})
        if len(value) > MAX_METADATA_VALUE_CHARS:
            message = f"a value has at most {MAX_METADATA_VALUE_CHARS} characters"
            raise PydanticCustomError("invalid", message, {"param": key})
    return metadata


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _as_items(items: Any) -> Any:
    """A text is a user's message. A reference to an item may come without saying that it is one."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise PydanticCustomError("invalid", "must be a string or a list of items")
    return [
        {"type": "item_reference"} | item if isinstance(item, dict) and set(item) == {"id"} else item for item in items
    ]


METADATA_SCHEMA = {  # _check_metadata's rules, for the served document
    "type": "object",
    "maxProperties": MAX_METADATA_PAIRS,
    "propertyNames": {"maxLength": MAX_METADATA_KEY_CHARS},
    "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE_CHARS},
}
Metadata = Annotated[
    dict[str, str],
    BeforeValidator(_check_few_pairs, json_schema_input_type=dict[str, str]),
    AfterValidator(_check_metadata),
    WithJsonSchema(METADATA_SCHEMA),
]
Include = Annotated[
    list[str],
    BeforeValidator(_nothing_included, json_schema_input_type=Annotated[list[str], Field(max_length=0)]),
]


class TextPart(Body):
    """The only kind of content. An answer's part is taken back as it went out."""

    not_implemented = PART_NOT_IMPLEMENTED
    ignored = frozenset({"prompt_cache_breakpoint"})

    type: Annotated[Literal["input_text", "output_text"], _only("input_text", "output_text")]
    text: str


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class MessageItem(Body):
    """The only kind of item. An item is taken back as it went out; its old id and status mean nothing."""

    not_implemented = ITEM_NOT_IMPLEMENTED
    ignored = frozenset({"id", "status"})

    type: Annotated[Literal["message"], _only("message")] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[TextParts, BeforeValidator(_as_parts, json_schema_input_type=str | TextParts)]

    def item(self, item_id: str) -> ItemJson:
        if self.role == "assistant":
            parts = [output_text(part.text) for part in self.content]
        else:
            parts = [{"type": "input_text", "text": part.text} for part in self.content]
        return {"id": item_id, "type": "message", "status": "completed", "role": self.role, "content": parts}


SomeItems = Annotated[list[MessageItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
FewItems = Annotated[list[MessageItem], Field(max_length=MAX_ITEMS)]
SomeFewItems = Annotated[list[MessageItem], Field(min_length=1, max_length=MAX_ITEMS)]


def output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def messages_of(items: Iterable[ItemJson], instructions: str | None = None) -> tuple[tuple[str, str], ...]:
    """(role, text) for a ChatPrompt: instructions first, as the system's; a developer is the system."""
    messages = [] if instructions is None else [("system", instructions)]
    for item in items:
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append((role, "".join(part["text"] for part in item["content"])))
    return tuple(messages)


def _with_ids(items: Iterable[MessageItem], new_id: Callable[[], str]) -> tuple[ItemJson, ...]:
    return tuple(item.item(new_id()) for item in items)


class TextConfig(Body):
    not_implemented = TEXT_NOT_IMPLEMENTED


class Reasoning(Body):
    not_implemented = REASONING_NOT_IMPLEMENTED


class PromptCacheOptions(Body):
    not_implemented = CACHE_OPTIONS_NOT_IMPLEMENTED


class ResponseStreamOptions(StreamOptions):
    not_implemented = STREAM_OPTIONS_NOT_IMPLEMENTED


class ResponseBody(GenerationBody):
    """POST /v1/responses."""

    not_implemented = RESPONSE_NOT_IMPLEMENTED
    ignored = RESPONSE_IGNORED
    prompt_param = "input"

    input: Annotated[SomeItems, BeforeValidator(_as_items, json_schema_input_type=str | SomeItems)]
    previous_response_id: SessionKey | None = None
    store: bool = True
    instructions: str | None = None
    metadata: Metadata = Field(default_factory=dict)
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    truncation: Literal["disabled", "auto"] = "disabled"
    stream_options: ResponseStreamOptions | None = None
    tool_choice: Annotated[Literal["auto", "none"], _only("auto", "none")] = "auto"
    parallel_tool_calls: bool = True
    include: Include = Field(default_factory=list)
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    prompt_cache_options: PromptCacheOptions | None = None

    @model_validator(mode="after")
    def _check_one_history(self) -> Self:
        if self.previous_response_id is not None and self.conversation is not None:
            raise PydanticCustomError(
                "mutually_exclusive_parameters",
                "cannot be combined with conversation; give only one of them",
                {"param": "previous_response_id"},
            )
        return self

    @property
    def conversation_id(self) -> str | None:
        return None if self.conversation is None else self.conversation.id

    def input_items(self, new_id: Callable[[], str]) -> tuple[ItemJson, ...]:
        """The new input alone, each item with an id (msg_...) of its own from new_id."""
        return _with_ids(self.input, new_id)

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidParameterError for a value out of range."""
        return self._sampling_params(self.max_output_tokens, None)


class ConversationBody(Body):
    """POST /v1/conversations."""

    items: Annotated[FewItems, BeforeValidator(_as_items, json_schema_input_type=str | FewItems)] = Field(
        default_factory=list
    )
    metadata: Metadata = Field(default_factory=dict)

    def new_items(self, new_id: Callable[[], str]) -> tuple[ItemJson, ...]:
        return _with_ids(self.items, new_id)


class ConversationUpdateBody(Body):
    """POST /v1/conversations/{id}: these pairs in place of the old ones. null clears them; absent is a mistake."""

    metadata: Annotated[Metadata, WithJsonSchema({"anyOf": [METADATA_SCHEMA, {"type": "null"}]})]

    @model_validator(mode="before")
    @classmethod
    def _null_clears(cls, data: Any) -> Any:
        if isinstance(data, dict) and "metadata" in data and data["metadata"] is None:
            return data | {"metadata": {}}
        return data


class ItemsBody(Body):
    """POST /v1/conversations/{id}/items."""

    items: Annotated[SomeFewItems, BeforeValidator(_as_items, json_schema_input_type=str | SomeFewItems)]
    include: Include = Field(default_factory=list)

    def new_items(self, new_id: Callable[[], str]) -> tuple[ItemJson, ...]:
        return _with_ids(self.items, new_id)


class ListQuery(Query):
    """Which part of a list: up to limit items after that one, in the order of time or against it."""

    not_implemented = QUERY_NOT_IMPLEMENTED

    after: SessionKey | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"


class RetrieveQuery(Query):
    """GET /v1/responses/{id}."""

    not_implemented = RETRIEVE_NOT_IMPLEMENTED
    ignored = frozenset({"include_obfuscation"})
