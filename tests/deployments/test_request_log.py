"""The line of a generation that has ended, and whose id log lines have."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from ray._common.formatters import JSONFormatter

from deployments import ingress
from deployments.errors import ReplicaLostError
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest
from deployments.ingress import IngressConfig, create_app
from deployments.origin import origin_of
from deployments.request_log import RequestLog
from deployments.traces import IngressTraces
from engine.core.phases import RequestPhases
from engine.core.stats import RequestStats
from engine.explanation import Explanation, Route
from engine.text.output import OutputDelta
from tests.deployments.conftest import ScriptedEngine

STATS = RequestStats(
    num_prompt_tokens=5,
    num_cached_tokens=3,
    num_loaded_tokens=0,
    num_not_loaded_tokens=0,
    num_dropped_tokens=0,
    num_new_tokens=2,
    num_output_tokens=1,
    num_computed_tokens=2,
    num_suspensions=0,
    cached_by_tier={"gpu": 3},
    arrival_s=7.0,
    first_token_s=8.0,
    finished_s=9.0,
    phases=RequestPhases(),
)
EXPLANATION = Explanation(
    begun_s=1e9,
    prepare_s=0.25,
    stats=STATS,
    computed_by_reason={"new": 2},
    route=Route(begun_s=1e9, replica_rank=2, is_home=True, seconds=0.125),
)
LAST = DeltaItem(OutputDelta("secret", (1,), (), (), 5, 3, 1, "stop", explanation=EXPLANATION), 2)
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "secret"}]}


@pytest.fixture
async def logged(engine: ScriptedEngine, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that logs requests."""
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 'c.db'}", log_requests=True)
    app: FastAPI = create_app(engine, config, ingress_id="i", watches=[RequestLog()])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What Serve's JSON log would have of the generations."""
    records = [record for record in caplog.records if hasattr(record, "generation")]
    return [json.loads(JSONFormatter().format(record)) for record in records]


async def test_a_line_for_each_generation_with_the_id_of_its_request(
    logged: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.items = [LAST]
    caplog.set_level(logging.INFO, "ray.serve")
    ids = ["mine-1", "mine-2"]
    answers = await asyncio.gather(
        *(
            logged.post("/v1/chat/completions", json=BODY, headers={"X-Request-Id": each, "x-session-id": each})
            for each in ids
        )
    )
    told = lines(caplog)
    by_id = {answer.json()["id"]: name for answer, name in zip(answers, ids, strict=True)}
    assert {line["generation"]["id"]: line["request_id"] for line in told} == by_id
    assert "explanation" not in answers[0].json()["choices"][0], "the client did not ask"
    generation = told[0]["generation"]
    assert generation["outcome"] == "finished"
    assert generation["explanation"]["seconds"]["route"] == 0.125
    assert generation["explanation"]["computed_tokens_by_reason"] == {"new": 2}
    assert (generation["replica"], generation["cached_tokens"], generation["tenant"]) == (2, 3, "local")
    assert "finished: " in told[0]["message"]
    assert "secret" not in caplog.text + json.dumps(told), "texts of users are never logged"


async def test_failures_are_told_too(
    logged: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.items = [ErrorItem.of(ReplicaLostError("gone"))]
    caplog.set_level(logging.INFO, "ray.serve")
    await logged.post("/v1/completions", json={"model": "tiny", "prompt": "secret"})
    (line,) = lines(caplog)
    assert (line["generation"]["outcome"], line["generation"]["error"]) == ("failed", "ReplicaLostError")
    assert len(line["request_id"]) == 32, "the client named none"


@pytest.mark.parametrize("hostile", ["a\nb", "x" * 10_000, "", "id with spaces", "é", '"\x1b[2J'])
def test_an_id_that_could_forge_lines_is_not_taken(hostile: str) -> None:
    assert len(origin_of({"x-request-id": hostile}).request_id) == 32
    assert origin_of({"x-request-id": "good-1"}).request_id == "good-1"


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01" + "-x" * 5000,
    ],
)
def test_a_trace_that_is_none(traceparent: str) -> None:
    origin = origin_of({"traceparent": traceparent, "tracestate": "a=b"})
    assert (origin.traceparent, origin.tracestate, origin.trace_id, origin.is_sampled) == ("", "", "", False)


async def test_a_defect_is_a_failure_and_no_client_that_left(
    logged: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        raise ZeroDivisionError("secret")
        yield

    monkeypatch.setattr(engine, "generate", fail)
    caplog.set_level(logging.INFO, "ray.serve")
    await logged.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
    (line,) = lines(caplog)
    assert (line["generation"]["outcome"], line["generation"]["error"]) == ("failed", "InternalError")


async def test_the_log_names_the_trace_that_the_server_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "start_tracing", lambda kind: TracerProvider(shutdown_on_exit=False))
    watches = ingress._watches(IngressConfig(store_url="sqlite://", log_requests=True, traces="console"))
    assert [type(watch) for watch in watches] == [IngressTraces, RequestLog]
