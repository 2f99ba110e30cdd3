"""The served OpenAPI document: it is valid, covers every route, and tells the truth.

schemathesis makes requests from it, right and wrong ones, for the application in this process over the embedded model's
engine and a SQLite store.

PENSIEVE_FUZZ_CASES: how many, spread over the operations. From 2000 on schemathesis' coverage phase is added: about as
many again, with each value at and beyond each limit of the document.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import httpx
import pytest
import requests
import schemathesis
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig

from deployments.cache_map import STREAM_PATH
from deployments.completions.requests import CompletionBody
from deployments.http.parsing import validated
from deployments.ingress import Engine, IngressConfig, create_app
from deployments.routing.engine_client import EngineClient
from deployments.tenants import TenantConfig, hash_key
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.errors import InvalidParameterError
from tests.deployments.engine_here import EngineHere

MODEL = "pensieve-recall-0.6m"
NUM_CASES = int(os.environ.get("PENSIEVE_FUZZ_CASES", "300"))
CASE_TIMEOUT_S = 30.0
# Small, so that no request can ask for much.
OPTIONS = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 64, "max_model_len": 64}


def make_app(engine: Engine, store_url: str) -> FastAPI:
    return create_app(engine, IngressConfig(store_url=store_url, demo=True), ingress_id="ingress-1")


APP = make_app(create_autospec(EngineClient, instance=True), "sqlite:///never-opened.db")  # for its document
PUBLIC = {"/health", "/load", "/openapi.json", "/ping", "/ready", "/version"}


async def document_of(app: FastAPI) -> dict[str, Any]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/openapi.json")
    assert answer.status_code == 200
    return dict(answer.json())


DOCUMENT = asyncio.run(document_of(APP))
NUM_OPERATIONS = sum(  # those that there is more than one request of
    bool(operation["parameters"] or "requestBody" in operation)
    for operations in DOCUMENT["paths"].values()
    for operation in operations.values()
)
SCHEMA = schemathesis.openapi.from_dict(
    DOCUMENT,
    config=SchemathesisConfig.from_dict(
        {
            "phases": {"coverage": {"enabled": NUM_CASES >= 2000}},
            "generation": {"with-security-parameters": False},  # without tenants no client needs a key
        }
    ),
)
ALL_CHECKS = {check.__name__: check for check in CHECKS.get_all()}
LEFT_OUT = {
    # Refusals that no schema can say are looked at in check_refusal.
    "positive_data_acceptance",
    # They compare requests of one run with each other; here each stands alone.
    "use_after_free",
    "ensure_resource_availability",
    "object_level_authorization",
    # Without tenants no client needs a key; test_tenants and test_responses_api have them.
    "ignored_auth",
    # A defect is a 500, and promised as such; see check_status.
    "not_a_server_error",
}
# What a request by the schemas can still be refused for, with 400: where its parts contradict each other, the window or the
# vocabulary.
REFUSALS = re.compile(
    r"^stream_options: only allowed when stream is true$"
    r"|^adapters of '.*' are not loaded while the server runs"
    r"|^top_logprobs: only allowed when logprobs is true$"
    r"|^max_tokens: conflicts with max_completion_tokens"
    r"|^previous_response_id: cannot be combined with conversation"
    r"|^min_tokens must be at most (max_tokens|\d+, the size of the context window)"
    r"|^the context window is \d+ tokens"
    r"|^response_format.json_schema: has to be there if, and only if"
    r"|^structured_outputs: (has to have exactly one|cannot be combined with response_format)"
    r"|^(min_tokens|ignore_eos) must be (0|false) with a grammar"
    r"|^the grammar cannot be used: "
    r"|^(response_format|structured_outputs): cannot be combined with tools that may be called"
    r"|^tools: (two tools have the same name|have more than \d+ characters)"
    r"|^tool_choice: tool_choice (asks for a call, but there are no tools|(names|allows) .*, but no tool has that name)$"
    r"|^messages\[\d+\]\.\w+: (required in a message of|only allowed in a message of)"
    r"|^chat_template_kwargs(\.\S+:| may not have)"
    r"|^token id \d+ is outside the vocabulary"
    r"|^messages\[\d+\]\.content\[\d+\]\.\w+: required in a part of type"
    r"|^prompt: give either prompt or messages$"
    r"|^'after' must be the id of an item in this list"
    r"|^starting_after: only allowed when stream is true$"
    r"|^add_special_tokens: must be false with messages"
    r"|^logit_bias: must have token ids as its names"
    r"|^give at least one of ttl_s, priority, expected_return_s and release$"
    r"|^release: a conversation that is released is not kept"
    r"|^best_of: must be equal to n"
    r"|^input: refers to the same item twice"
    r"|^max_tokens: must be at least 1, unless echo is true"
    r"|^prompt_logprobs: only allowed when stream is false"
    r"|^continue_final_message: (cannot be combined with|needs a last message|needs messages)"
    # Those of the Messages API only.
    r"|^prompt is too long: the context window is \d+ tokens"
    r"|^messages: (say nothing|end with a call of a tool)"
    r"|^messages\[\d+\]\.content: \w+ blocks are only allowed in a message of the"
    r"|^(thinking.budget_tokens|tool_choice.name): required if type is (enabled|tool)$"
)


class Server:
    """The application on an event loop of its own: hypothesis' tests are synchronous."""

    def __init__(self, portal: BlockingPortal, client: httpx.AsyncClient) -> None:
        self._portal = portal
        self._client = client
        self.num_cases = 0

    def send(self, request: requests.PreparedRequest) -> httpx.Response:
        """TimeoutError where it hangs."""

        async def send() -> httpx.Response:
            async with asyncio.timeout(CASE_TIMEOUT_S):
                return await self._client.request(
                    request.method or "", request.url or "", headers=dict(request.headers), content=request.body
                )

        return self._portal.call(send)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.send(requests.Request("POST", f"http://localhost{path}", json=body).prepare())
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'conversations.db'}"

    @asynccontextmanager
    async def serving() -> AsyncIterator[httpx.AsyncClient]:
        engine = EngineHere(EngineConfig.from_options(OPTIONS), stream_interval_s=0.0)
        app = make_app(engine, url)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client,
        ):
            yield client
        await engine.check_integrity()
        await engine.__del__()

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serving()) as client:
        server = Server(portal, client)
        yield server
        print(f"{server.num_cases} cases")


def test_the_document_is_valid_and_has_every_route() -> None:
    SCHEMA.validate()
    routes = [route for route in APP.routes if isinstance(route, APIRoute)]
    there = {(method.lower(), route.path.replace(":path", "")) for route in routes for method in route.methods}
    there -= {("head", path) for _, path in there}
    assert {(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations} == there
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) is (operation["security"] != []) is (path not in PUBLIC)


def limits(schema: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The last value within and the first one beyond each limit."""
    numbers = [choice for choice in schema["anyOf"] if choice.get("type") in ("integer", "number")]
    (number,) = [choice for choice in numbers if "const" not in choice]
    for limit, exclusive, way in (("minimum", "exclusiveMinimum", -1), ("maximum", "exclusiveMaximum", 1)):
        for name in {limit, exclusive} & set(number):
            bound = number[name]
            beyond = bound + way if number["type"] == "integer" else math.nextafter(bound, way * math.inf)
            within = bound - way if number["type"] == "integer" else math.nextafter(bound, -way * math.inf)
            yield (bound, beyond) if name == limit else (within, bound)


@pytest.mark.parametrize(
    ("name", "num_limits"),
    [
        ("min_tokens", 1),
        ("max_thinking_tokens", 1),
        ("temperature", 2),
        ("top_p", 2),
        ("min_p", 2),
        ("repetition_penalty", 2),
        ("presence_penalty", 2),
        ("frequency_penalty", 2),
        ("seed", 2),
        ("logprobs", 2),
        ("prompt_logprobs", 2),
    ],
)
def test_the_limits_are_those_of_the_engine(name: str, num_limits: int) -> None:
    found = list(limits(DOCUMENT["components"]["schemas"]["CompletionBody"]["properties"][name]))
    assert len(found) == num_limits
    for within, beyond in found:
        SamplingParams(**{name: within})
        CompletionBody.model_validate({"model": MODEL, "prompt": "x", name: within})
        with pytest.raises(InvalidParameterError):
            SamplingParams(**{name: beyond})
        with pytest.raises(InvalidParameterError) as caught:
            validated(CompletionBody, {"model": MODEL, "prompt": "x", name: beyond})
        assert caught.value.param == name


async def test_a_key_is_asked_for_where_the_document_says_so(engine: Engine, tmp_path: Path) -> None:
    tenants = (TenantConfig(id="a", api_keys_sha256=(hash_key("sk-a"),)),)
    url = f"sqlite:///{tmp_path / 'conversations.db'}"
    app = create_app(engine, IngressConfig(store_url=url, tenants=tenants, demo=True), ingress_id="ingress-1")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
    ):
        for path, operations in DOCUMENT["paths"].items():
            for method, operation in operations.items():
                answer = await client.request(method, path.replace("{", "").replace("}", ""))
                assert answer.status_code == (401 if operation["security"] else 200), path
                assert ("www-authenticate" in answer.headers) is bool(operation["security"])


def methods_of(path: str) -> set[str]:
    """Also those of another path that may stand for this one, as an id may be any word; HEAD is wherever GET is."""
    found = {
        method.upper()
        for other, operations in DOCUMENT["paths"].items()
        if re.fullmatch(re.sub(r"{\w+}", "[^/]+", other), path)
        for method in operations
    }
    return found | ({"HEAD"} if "GET" in found and path != STREAM_PATH else set())


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_other_methods_are_refused_with_those_that_there_are(server: Server, path: str) -> None:
    path = path.replace("{", "").replace("}", "")
    there = methods_of(path)
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "NONSENSE"} - there:
        answer = server.send(requests.Request(method, f"http://localhost{path}").prepare())
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == {*there, "OPTIONS"}
    options = server.send(requests.Request("OPTIONS", f"http://localhost{path}/").prepare())
    assert (options.status_code, options.content) == (204, b"")
    assert set(options.headers["allow"].split(", ")) == {*there, "OPTIONS"}


def make_answerable(case: schemathesis.Case, server: Server) -> None:
    """Random ids and models exist nowhere: most requests get real ones, chosen by what else they are."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL
    if case.path == "/v1/cache/map" and str(num := case.query.get("num_events", 10)).isdecimal() and int(num) > 1:
        case.query["num_events"] = 1  # else it ends when its client leaves, which here waits for the end
    names = case.path_parameters
    if not names or zlib.crc32(repr((names, case.body)).encode()) % 3 == 0:
        return
    if "response_id" in names:
        new = {"model": MODEL, "input": "hi", "max_output_tokens": 1}
        names["response_id"] = server.post("/v1/responses", new)["id"]
    elif "conversation_id" in names:
        items = [{"role": "user", "content": "hi"}]
        conversation = server.post("/v1/conversations", {})
        names["conversation_id"] = conversation["id"]
        if "item_id" in names:
            path = f"/v1/conversations/{conversation['id']}/items"
            names["item_id"] = server.post(path, {"items": items})["data"][0]["id"]
    elif "model" in names:
        names["model"] = MODEL


def check_status(case: schemathesis.Case, response: httpx.Response) -> None:
    promised = case.operation.definition.raw["responses"]
    assert response.status_code < 500 or (response.status_code in (503, 504) and str(response.status_code) in promised)
    # What fails after the start of a stream is an event.
    assert '"server_error"' not in response.text


def check_refusal(case: schemathesis.Case, response: httpx.Response) -> None:
    if case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE and response.status_code == 400:
        assert REFUSALS.search(response.json()["error"]["message"]), response.text


def checks_of(case: schemathesis.Case, response: httpx.Response) -> list[Any]:
    """Of schemathesis's checks those that know what this answer means."""
    left_out = set(LEFT_OUT)
    if response.status_code == 413:
        left_out.add("negative_data_rejection")  # whatever is wrong inside, a body that is too large is not read
    if methods_of(case.operation.path) - {"HEAD"} != {
        method.upper() for method in DOCUMENT["paths"][case.operation.path]
    }:
        left_out.add("allow_header_conformance")  # another path with an id may stand for this one
    return [check for name, check in ALL_CHECKS.items() if name not in left_out]


@SCHEMA.parametrize()
@settings(
    max_examples=math.ceil(NUM_CASES / NUM_OPERATIONS),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_requests_made_from_the_document(case: schemathesis.Case, server: Server) -> None:
    server.num_cases += 1
    make_answerable(case, server)
    request = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
    response = server.send(request)
    check_status(case, response)
    check_refusal(case, response)
    case.validate_response(response, checks=checks_of(case, response))
