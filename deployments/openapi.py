"""The OpenAPI document that /openapi.json serves, made from the classes that parse the requests.

So it says what they take. The answers are OpenAI's and described loosely: what each is, and what is always in it. Plain
data in and out; knows no HTTP library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from deployments.cache_map import HoldBody, MapQuery
from deployments.completions.requests import ChatCompletionBody, CompletionBody
from deployments.completions.tokens import DetokenizeBody, TokenizeBody
from deployments.conversation_cache import CacheHintBody
from deployments.http.adapters import LoadAdapterBody, UnloadAdapterBody
from deployments.http.parsing import Body, Query
from deployments.messages.requests import CountTokensBody, MessagesBody
from deployments.responses.conversation_requests import (
    ConversationBody,
    ConversationUpdateBody,
    ItemsBody,
    ListQuery,
    RetrieveQuery,
)
from deployments.responses.requests import ResponseBody
from engine import __version__

_SCHEMAS = "#/components/schemas/"
# Any request can be too large or meet a defect; where a key is asked for, it can be wrong or needed.
_ALWAYS = (413, 431, 500)
_AUTHENTICATION = (401, 403)
_GENERATION = (404, 429, 503, 504)
_STORE = (404, 503)
_RETRY_AFTER = {
    "headers": {"retry-after": {"description": "when to try again, in seconds", "schema": {"type": "integer"}}}
}
_ERRORS: Mapping[int, str] = {
    400: "the request is wrong; the error names the parameter",
    401: "the API key is missing or unknown",
    403: "no API keys are configured, and the client is not a program on this machine; or the key is no operator's",
    404: "no such id, model or path for this tenant",
    409: "a turn of this conversation is running, or was cancelled meanwhile",
    413: "the body is too large",
    415: "the body is compressed in an unknown way; or no API keys are configured, and it does not say that it is JSON",
    429: "too many requests or tokens for now",
    431: "the headers are too large",
    500: "a defect of the server",
    503: "no engine replica or no conversation store at the moment",
    504: "no answer within the request's timeout",
    529: "the server is full",
}
_OPENAI_ERROR_SCHEMA = {
    "type": "object",
    "description": "Every error, whatever its status.",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ANTHROPIC_ERROR_SCHEMA = {
    "type": "object",
    "description": "Every error of the Messages API, whatever its status.",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
        "request_id": {"type": "string"},
    },
    "required": ["type", "error", "request_id"],
}
_ERROR_SCHEMAS = {"Error": _OPENAI_ERROR_SCHEMA, "AnthropicError": _ANTHROPIC_ERROR_SCHEMA}


def _object(kind: str, *required: str) -> dict[str, Any]:
    """An answer that says what it is."""
    return {
        "type": "object",
        "properties": {"object": {"const": kind}},
        "required": [*required, "object"],
    }


def _fields(*required: str) -> dict[str, Any]:
    return {"type": "object", "required": [*required]}


@dataclass(frozen=True, slots=True)
class _Operation:
    """What one route takes and gives.

    errors: statuses besides those that every route of its kind has.
    links: to the operation of that name, with the answer's id as that parameter.
    """

    summary: str
    answer: Mapping[str, Any]
    errors: tuple[int, ...] = ()
    body: type[Body] | None = None
    is_body_optional: bool = False
    query: type[Query] | None = None
    streams: bool = False
    only_streams: bool = False
    is_public: bool = False
    error_schema: str = "Error"
    media_type: str = "application/json"
    links: Mapping[str, str] = field(default_factory=dict)


_RESPONSE = _object("response", "id", "created_at", "status", "model", "output")
_CONVERSATION = _object("conversation", "id", "created_at", "metadata")
_CONVERSATION_CACHE = _object(
    "conversation.cache", "id", "replica", "tokens", "cached_tokens", "cached_tokens_by_tier", "hint"
)
_ITEM = _fields("id", "type", "status")
_CACHE_MAP = _object("cache.map", "operator", "demo", "replicas")
_MESSAGE = ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage")
_LIST = _object("list", "data", "first_id", "last_id", "has_more")
_DELETED = {"type": "object", "properties": {"deleted": {"const": True}}, "required": ["id", "object", "deleted"]}
_OF_RESPONSE = dict.fromkeys(("get_response", "list_input_items", "cancel_response", "delete_response"), "response_id")
_OF_CONVERSATION = dict.fromkeys(
    ("get_conversation", "list_items", "add_items", "update_conversation", "delete_conversation"), "conversation_id"
)
_OPERATIONS: Mapping[tuple[str, str], _Operation] = {
    ("POST", "/v1/chat/completions"): _Operation(
        "Answer a chat",
        _object("chat.completion", "id", "created", "model", "choices", "usage"),
        _GENERATION,
        body=ChatCompletionBody,
        streams=True,
    ),
    ("POST", "/v1/completions"): _Operation(
        "Continue a text",
        _object("text_completion", "id", "created", "model", "choices", "usage"),
        _GENERATION,
        body=CompletionBody,
        streams=True,
    ),
    ("POST", "/tokenize"): _Operation(
        "The tokens of a text or a chat",
        _fields("count", "max_model_len", "tokens", "token_strs"),
        _GENERATION,
        body=TokenizeBody,
    ),
    ("POST", "/detokenize"): _Operation("The text of tokens", _fields("prompt"), _GENERATION, body=DetokenizeBody),
    ("POST", "/v1/load_lora_adapter"): _Operation(
        "Load an adapter in all replicas", {"type": "string"}, (404, 503), body=LoadAdapterBody, media_type="text/plain"
    ),
    ("POST", "/v1/unload_lora_adapter"): _Operation(
        "Take no further request with an adapter",
        {"type": "string"},
        (404, 503),
        body=UnloadAdapterBody,
        media_type="text/plain",
    ),
    ("POST", "/v1/messages"): _Operation(
        "Answer a chat, as Anthropic's API does",
        {"type": "object", "properties": {"type": {"const": "message"}}, "required": [*_MESSAGE]},
        (*_GENERATION, 529),
        body=MessagesBody,
        streams=True,
        error_schema="AnthropicError",
    ),
    ("POST", "/v1/messages/count_tokens"): _Operation(
        "Count the tokens of such a chat",
        _fields("input_tokens"),
        (*_GENERATION, 529),
        body=CountTokensBody,
        error_schema="AnthropicError",
    ),
    ("POST", "/v1/responses"): _Operation(
        "Answer the next turn of a conversation that the server keeps",
        _RESPONSE,
        (*_GENERATION, 409),
        body=ResponseBody,
        streams=True,
        links=_OF_RESPONSE,
    ),
    ("POST", "/v1/responses/input_tokens"): _Operation(
        "Count the tokens that a response would read",
        _object("response.input_tokens", "input_tokens"),
        _GENERATION,
        body=ResponseBody,
    ),
    ("GET", "/v1/responses/{response_id}"): _Operation(
        "A stored response, whole or told again", _RESPONSE, _STORE, query=RetrieveQuery, streams=True
    ),
    ("DELETE", "/v1/responses/{response_id}"): _Operation("Delete a response", _DELETED, _STORE),
    ("POST", "/v1/responses/{response_id}/cancel"): _Operation("Cancel a running response", _RESPONSE, _STORE),
    ("GET", "/v1/responses/{response_id}/input_items"): _Operation(
        "What a response answers", _LIST, _STORE, query=ListQuery
    ),
    ("POST", "/v1/conversations"): _Operation(
        "Begin a conversation",
        _CONVERSATION,
        (503,),
        body=ConversationBody,
        is_body_optional=True,
        links=_OF_CONVERSATION,
    ),
    ("GET", "/v1/conversations/{conversation_id}"): _Operation("A conversation", _CONVERSATION, _STORE),
    ("POST", "/v1/conversations/{conversation_id}"): _Operation(
        "Replace a conversation's metadata", _CONVERSATION, _STORE, body=ConversationUpdateBody
    ),
    ("DELETE", "/v1/conversations/{conversation_id}"): _Operation("Delete a conversation", _DELETED, _STORE),
    ("GET", "/v1/conversations/{conversation_id}/cache"): _Operation(
        "What is cached of a conversation", _CONVERSATION_CACHE, (*_STORE, 429)
    ),
    ("PATCH", "/v1/conversations/{conversation_id}/cache"): _Operation(
        "Say how long a conversation is worth keeping in the cache",
        _CONVERSATION_CACHE,
        (*_STORE, 429),
        body=CacheHintBody,
    ),
    ("GET", "/v1/conversations/{conversation_id}/items"): _Operation(
        "The items of a conversation", _LIST, _STORE, query=ListQuery
    ),
    ("POST", "/v1/conversations/{conversation_id}/items"): _Operation(
        "Add items to a conversation", _LIST, (*_STORE, 409), body=ItemsBody
    ),
    ("GET", "/v1/conversations/{conversation_id}/items/{item_id}"): _Operation("One item", _ITEM, _STORE),
    ("DELETE", "/v1/conversations/{conversation_id}/items/{item_id}"): _Operation(
        "Take an item out of a conversation", _CONVERSATION, (*_STORE, 409)
    ),
    ("GET", "/v1/cache/map"): _Operation(
        "Where the chunks of conversations lie, now and as it changes",
        _CACHE_MAP,
        (429,),
        query=MapQuery,
        only_streams=True,
    ),
    ("POST", "/v1/cache/demo"): _Operation(
        "Make the tiers smaller for a demonstration, or as large as they are",
        _object("cache.demo", "replicas"),
        body=HoldBody,
        is_body_optional=True,
    ),
    ("GET", "/v1/models"): _Operation("The models served here", _object("list", "data"), (503,)),
    ("GET", "/v1/models/{model}"): _Operation("One model", _object("model", "id", "created"), (404, 503)),
    ("GET", "/health"): _Operation("Whether the process answers", _fields("status"), is_public=True),
    ("GET", "/ping"): _Operation(
        "The same, by the name that some load balancers ask for", _fields("status"), is_public=True
    ),
    ("GET", "/load"): _Operation(
        "How many requests run or wait in all engine replicas", _fields("server_load"), (503,), is_public=True
    ),
    ("GET", "/metrics"): _Operation(
        "The application's series, for Prometheus", {"type": "string"}, (503,), media_type="text/plain"
    ),
    ("GET", "/ready"): _Operation("Whether engine and store answer", _fields("status"), (503,), is_public=True),
    ("GET", "/version"): _Operation("The version of the server", _fields("version"), is_public=True),
    ("GET", "/openapi.json"): _Operation("This document", _fields("openapi", "paths"), is_public=True),
}


def openapi_document(routes: Iterable[tuple[str, str, str]], *, is_strict: bool = False) -> dict[str, Any]:
    """The document of these routes (method, path as FastAPI writes it, name). KeyError: one that has no description.

    is_strict: unknown parameters are refused.
    """
    kinds = [body for operation in _OPERATIONS.values() if (body := operation.body) is not None]
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=_SCHEMAS + "{model}", schema_generator=_Untitled
    )
    if not is_strict:
        for schema in definitions["$defs"].values():
            schema.pop("additionalProperties", None)
    paths: dict[str, dict[str, Any]] = {}
    for method, path, name in routes:
        path = re.sub(r":\w+}", "}", path)
        paths.setdefault(path, {})[method.lower()] = _operation(name, path, _OPERATIONS[method, path])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pensieve on Ray",
            "version": __version__,
            "description": "OpenAI's API over an engine that keeps the KV cache of a conversation between requests.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"] | _ERROR_SCHEMAS,
            "responses": {
                f"{schema}{status}": _error(schema, status) for schema in _ERROR_SCHEMAS for status in _ERRORS
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "the tenant's API key"}},
        },
    }


class _Untitled(GenerateJsonSchema):
    """Without a title per field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _operation(name: str, path: str, operation: _Operation) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": parameter, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for parameter in re.findall(r"{(\w+)}", path)
    ]
    if operation.query is not None:
        parameters += _query_parameters(operation.query)
    described: dict[str, Any] = {"operationId": name, "summary": operation.summary, "parameters": parameters}
    statuses = {*_ALWAYS, *operation.errors}
    if operation.is_public:
        described["security"] = []
    else:
        described["security"] = [{"key": []}]
        statuses |= {*_AUTHENTICATION}
    if operation.body is not None:
        described["requestBody"] = {
            "required": not operation.is_body_optional,
            "content": {"application/json": {"schema": {"$ref": _SCHEMAS + operation.body.__name__}}},
        }
    if operation.body is not None:
        statuses |= {400, 415, 429}
    if operation.query is not None:
        statuses |= {400}
    # Too large headers are refused before it is known which API they are for.
    schemas = {status: "Error" if status == 431 else operation.error_schema for status in sorted(statuses)}
    errors = {str(status): {"$ref": f"#/components/responses/{schema}{status}"} for status, schema in schemas.items()}
    described["responses"] = {"200": _answer(operation)} | errors
    return described


def _answer(operation: _Operation) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if not operation.only_streams:
        content[operation.media_type] = {"schema": dict(operation.answer)}
    if operation.streams or operation.only_streams:
        content["text/event-stream"] = {}  # OpenAPI 3.1 has no schema of a stream, only of its whole text
    answer: dict[str, Any] = {"description": "done", "content": content}
    if operation.links:
        answer["links"] = {
            name: {"operationId": name, "parameters": {parameter: "$response.body#/id"}}
            for name, parameter in operation.links.items()
        }
    return answer


def _error(schema: str, status: int) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": _ERRORS[status],
        "content": {"application/json": {"schema": {"$ref": _SCHEMAS + schema}}},
    }
    return described | (_RETRY_AFTER if status in (429, 503, 529) else {})


def _query_parameters(kind: type[Query]) -> list[dict[str, Any]]:
    """Without null, which a query string cannot say; what only null would pass is left out."""
    parameters = []
    for name, schema in kind.model_json_schema(schema_generator=_Untitled)["properties"].items():
        schema = dict(schema)
        if "anyOf" in schema:
            (of_value,) = (choice for choice in schema.pop("anyOf") if choice != {"type": "null"})
            schema |= of_value
        if "enum" in schema:
            schema["enum"] = [value for value in schema["enum"] if value is not None]
            if not schema["enum"]:
                continue
        if schema.get("default", "") is None:
            del schema["default"]
        if name in kind.ignored:
            schema["type"] = "string"  # any, but only one
        parameters.append({"name": name, "in": "query", "required": False, "schema": schema})
    return parameters
