"""`response_format` and `structured_outputs`: what they become, what is refused, and answers that have that form."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from deployments.completions.requests import ChatCompletionBody, CompletionBody
from deployments.http.parsing import parse_request
from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from engine.core.grammar import MAX_GRAMMAR_CHARS, GrammarSpec
from tests.deployments.engine_here import EngineHere
from tests.deployments.refusals import refusal

MODEL = "pensieve-recall-0.6m"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["kind", "age"],
    "additionalProperties": False,
}
URLS = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]}, "/v1/completions": {"prompt": "hi"}}


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, **more}}}


def grammar_of(kind: type[ChatCompletionBody] | type[CompletionBody], **changes: Any) -> GrammarSpec | None:
    prompt = URLS["/v1/chat/completions" if kind is ChatCompletionBody else "/v1/completions"]
    return parse_request(kind, json.dumps({"model": "m", **prompt, **changes}).encode())[0].sampling_params().grammar


@pytest.mark.parametrize("kind", [ChatCompletionBody, CompletionBody])
@pytest.mark.parametrize(
    ("changes", "grammar"),
    [
        ({}, None),
        ({"response_format": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "text", "json_schema": None}}, None),
        ({"response_format": {"type": "json_object"}}, GrammarSpec("json_object")),
        (schema_format(SCHEMA), GrammarSpec.json_schema(SCHEMA, is_lenient=True)),
        (schema_format(SCHEMA, strict=True, description=None), GrammarSpec.json_schema(SCHEMA)),
        (schema_format(None), GrammarSpec.json_schema(True, is_lenient=True)),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, GrammarSpec.json_schema(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, GrammarSpec.json_object()),
        ({"structured_outputs": {"regex": "[ab]+"}}, GrammarSpec("regex", "[ab]+")),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, GrammarSpec.choice(["yes", "no"])),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, GrammarSpec("gbnf", 'root ::= "a"')),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}, "response_format": {"type": "text"}},
            GrammarSpec("lark", 'start: "a"'),
        ),
    ],
)
def test_each_form_is_a_grammar(kind: Any, changes: dict[str, Any], grammar: GrammarSpec | None) -> None:
    assert grammar_of(kind, **changes) == grammar


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"response_format": "json"}, "response_format", "invalid_value"),
        ({"response_format": {}}, "response_format.type", "missing_required_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
            "response_format.json_schema",
            "invalid_value",
        ),
        (schema_format("x"), "response_format.json_schema.schema", "invalid_value"),
        (schema_format({"const": "x" * 200_000}), "response_format", "invalid_value"),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"json": "{}"}}, "structured_outputs.json", "invalid_value"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "invalid_value"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]", "invalid_value"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice", "invalid_value"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "unsupported_parameter",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "mutually_exclusive_parameters",
        ),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens", "invalid_value"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "invalid_value"),
    ],
)
@pytest.mark.parametrize("kind", [ChatCompletionBody, CompletionBody])
def test_refusals(kind: Any, changes: dict[str, Any], param: str, code: str) -> None:
    assert refusal(lambda: grammar_of(kind, **changes)) == (param, code)


@pytest.mark.parametrize("kind", [ChatCompletionBody, CompletionBody])
def test_what_is_too_large_is_refused_with_the_body(kind: type[ChatCompletionBody] | type[CompletionBody]) -> None:
    prompt = URLS["/v1/chat/completions" if kind is ChatCompletionBody else "/v1/completions"]
    schema = {"const": "x" * MAX_GRAMMAR_CHARS}
    for form, param in (
        (schema_format(schema), "response_format"),
        ({"structured_outputs": {"json": schema}}, "structured_outputs"),
    ):
        raw = json.dumps({"model": "m", **prompt, **form}).encode()
        assert refusal(partial(parse_request, kind, raw)) == (param, "invalid_value")


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    options = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 64, "max_model_len": 512}
    engine = EngineHere(EngineConfig.from_options(options), stream_interval_s=0.0)
    app = create_app(
        engine, IngressConfig(store_url=f"sqlite:///{tmp_path / 'conversations.db'}"), ingress_id="ingress-1"
    )
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=None) as http,
    ):
        yield http
    await engine.check_integrity()
    await engine.__del__()


async def answer(client: httpx.AsyncClient, url: str, **changes: Any) -> str:
    body = {"model": MODEL, "max_tokens": 200, **URLS[url], **changes}
    response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize("url", URLS)
async def test_every_answer_has_the_form(client: httpx.AsyncClient, url: str) -> None:
    """At a temperature at which the model says almost anything."""
    for seed in range(8):
        free = {"seed": seed, "temperature": 5.0}
        jsonschema.validate(json.loads(await answer(client, url, **schema_format(SCHEMA, strict=True), **free)), SCHEMA)
        assert await answer(client, url, structured_outputs={"choice": ["yes", "no"]}, **free) in ("yes", "no")
        word = await answer(client, url, structured_outputs={"regex": "[a-c]{3}-[0-9]{2}"}, **free)
        assert re.fullmatch("[a-c]{3}-[0-9]{2}", word)


@pytest.mark.parametrize("url", URLS)
async def test_what_cannot_be_enforced_is_refused_if_it_is_strict(client: httpx.AsyncClient, url: str) -> None:
    schema = SCHEMA | {"not": {"required": ["tags"]}}
    body = {"model": MODEL, **URLS[url]}
    for changes, param in (
        (schema_format(schema, strict=True), "response_format"),
        ({"structured_outputs": {"json": schema}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
    ):
        response = await client.post(url, json=body | changes)
        assert response.status_code == 400
        assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, "invalid_value")
    jsonschema.validate(json.loads(await answer(client, url, temperature=3.0, seed=1, **schema_format(schema))), SCHEMA)
