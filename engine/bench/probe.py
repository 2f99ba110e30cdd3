"""What a server takes and tells, found by asking it: no server has to be named.

A field that a server refuses is left out, and what that means for the figures is told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import httpx

from engine.bench.apis import Content, counts_of, make_conversation
from engine.bench.client import CONNECT_TIMEOUT_S, Answered, Client, ClientFault, Endpoint
from engine.errors import ConfigError
from engine.workloads.session import Session, Span, Turn

_SESSION = Session("probe", (Turn((Span(0, 8),), 8),))
# Fields beyond the bare request, and what it means if the server does not take one.
_USAGE = {"stream_options": {"include_usage": True}}
_OPTIONAL: dict[str, tuple[tuple[dict[str, Any], str], ...]] = {
    "chat": (
        (_USAGE, "takes no stream_options: tokens may be counted by the pieces that come"),
        ({"ignore_eos": True}, "takes no ignore_eos: answers end when the model ends them"),
        ({"temperature": 0}, "takes no temperature"),
    ),
    "completions": (
        (_USAGE, "takes no stream_options: tokens may be counted by the pieces that come"),
        ({"ignore_eos": True}, "takes no ignore_eos: answers end when the model ends them"),
        ({"temperature": 0}, "takes no temperature"),
        ({"return_token_ids": True}, "takes no return_token_ids"),
    ),
    "responses": (
        ({"ignore_eos": True}, "takes no ignore_eos: answers end when the model ends them"),
        ({"temperature": 0}, "takes no temperature"),
    ),
}
_OPTIONAL["responses-stored"] = _OPTIONAL["responses"]
# What says that a request was not understood, and not that the server is at fault.
_REFUSALS = ("400:", "404:", "405:", "415:", "422:")


@dataclass(frozen=True, slots=True)
class Probed:
    """The endpoint with its model and the fields that it takes, and what has to be known to read its figures."""

    endpoint: Endpoint
    notes: tuple[str, ...]


async def probe(endpoint: Endpoint, content: Content | None = None) -> Probed:
    """Ask for its models and for a few short answers. Raises ConfigError."""
    endpoint = replace(endpoint, model=endpoint.model or await _first_model(endpoint))
    optional = [
        (fields, note) for fields, note in _OPTIONAL[endpoint.api] if not fields.keys() & endpoint.fields.keys()
    ]
    answered = await _ask(endpoint, content, [fields for fields, _ in optional])
    notes = []
    if answered.heard.error.startswith(_REFUSALS):
        bare = await _ask(endpoint, content, [])
        _raise_if_wrong(endpoint, bare)
        taken: list[dict[str, Any]] = []
        for fields, note in optional:
            answered = await _ask(endpoint, content, [*taken, fields])
            if answered.heard.error.startswith(_REFUSALS):
                notes.append(note)
                answered = bare
            else:
                taken.append(fields)
    else:
        taken = [fields for fields, _ in optional]
    _raise_if_wrong(endpoint, answered)
    merged = {name: value for fields in taken for name, value in fields.items()}
    return Probed(replace(endpoint, fields={**merged, **endpoint.fields}), (*notes, *_notes_on(endpoint, answered)))


def _notes_on(endpoint: Endpoint, answered: Answered) -> list[str]:
    counts = counts_of(answered.heard)
    notes = [] if endpoint.model else ["lists no model: requests name none"]
    if counts.num_output_tokens is None:
        notes.append("does not count the tokens of its answers: their pieces are counted instead")
    if counts.num_cached_tokens is None:
        notes.append("does not say what it had cached")
    if endpoint.api == "completions" and not answered.heard.token_ids:
        notes.append("does not tell the token ids of its answers: others stand for them, which no cache can have")
    return notes


async def _ask(endpoint: Endpoint, content: Content | None, extra: list[dict[str, Any]]) -> Answered:
    fields = {name: value for each in extra for name, value in each.items()}
    client = Client(replace(endpoint, fields={**fields, **endpoint.fields}))
    try:
        conversation = make_conversation(endpoint.api, _SESSION, content or Content())
        turn = _SESSION.turns[0]
        return await client.ask(client.request(conversation.ask(turn), turn.output_tokens, "probe"), conversation)
    except ClientFault as fault:
        raise ConfigError(str(fault)) from fault
    finally:
        await client.close()


def _raise_if_wrong(endpoint: Endpoint, answered: Answered) -> None:
    error = answered.heard.error or ("" if answered.num_pieces else "an empty answer")
    if error:
        hint = " (--api-key)" if error.startswith("401:") else "" if endpoint.model else "; name the model with --model"
        raise ConfigError(
            f"{endpoint.name}: a first short request to {endpoint.api} at {endpoint.url} failed: {error}{hint}",
            param="url",
        )


async def _first_model(endpoint: Endpoint) -> str:
    """The first model that it lists; empty if it lists none, as transformers' server may, whose requests need none."""
    headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    try:
        async with httpx.AsyncClient(headers=headers, timeout=CONNECT_TIMEOUT_S, trust_env=False) as http:
            response = await http.get(f"{endpoint.url}/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        message = f"no answer from {endpoint.url} ({error or type(error).__name__}); is the server running?"
        raise ConfigError(message, param="url") from error
    if response.status_code in (401, 403):
        raise ConfigError(
            f"{endpoint.url}/models answers {response.status_code}; give the key with --api-key", param="api_key"
        )
    try:
        model = response.json()["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        return ""
    return model if isinstance(model, str) else ""
