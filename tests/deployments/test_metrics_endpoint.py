"""What Prometheus gets from a node that serves: every metric by its name, and the numbers that the clients were told."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from deployments.app import build
from deployments.cluster.serve_start import list_metrics_ports
from deployments.metric_definitions import METRICS
from deployments.schema import AppArgs
from engine.embedded_model import EMBEDDED_MODEL_NAME
from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe, free_port, start_ray

pytestmark = pytest.mark.ray

ARGS = AppArgs(
    # A GPU tier for one window and a half: two long requests at once, and one of them is suspended.
    engine={
        "model": "embedded",
        "dtype": "float32",
        "num_threads": 1,
        "num_gpu_blocks": 30,
        "max_model_len": 640,
        "kv_offloading_size": 0.02,
        "kv_hints": "client",
    },
    num_replicas=2,
    num_cpus=0.5,
    ingress_num_cpus=0.25,
    max_ongoing_requests=2,
    max_queued_requests=8,
    num_fallback_replicas=1,
    graceful_shutdown_timeout_s=1,
)
PATIENCE_S = 60.0
# Ray exports a counter when it has counted something; what is loaded from the disk or fetched from the other replica here
# depends on how busy the machine is. Guesses are off, as by default.
NOT_COUNTED = {
    definition.name
    for definition in METRICS
    if definition.name.startswith(("pensieve_tier_transfer", "pensieve_handover_"))
} | {"pensieve_guessed_tokens_total", "pensieve_accepted_tokens_total"}
DASHBOARD = Path(__file__).parents[2] / "deployments" / "dashboards" / "pensieve.json"

Sample = tuple[dict[str, str], float]


@pytest.fixture(scope="module")
def urls(local_serve: LocalServe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Of the server, and of the metrics as Prometheus finds them, of a Ray as pensieve-serve starts it."""
    local_serve.stop()
    http_port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AS_PENSIEVE_SERVE.items():
            patch.setenv(name, value)
        start_ray(_system_config={"metrics_report_interval_ms": 1000})
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": http_port})
            disk = {"kv_disk_path": str(tmp_path_factory.mktemp("kv")), "kv_disk_size": 0.05}
            serve.run(build(ARGS.model_copy(update={"engine": ARGS.engine | disk})), name="pensieve", route_prefix="/")
            (group,) = json.loads(list_metrics_ports().read_text())
            (target,) = group["targets"]
            yield f"http://127.0.0.1:{http_port}", f"http://{target}/metrics"
        finally:
            ray.shutdown()


def parse(text: str) -> dict[str, list[Sample]]:
    """Samples by name, of Prometheus's text format."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    for line in text.splitlines():
        if match := re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line):
            name, labels, value = match.groups()
            samples[name].append((dict(re.findall(r'(\w+)="([^"]*)"', labels or "")), float(value)))
    return samples


def total(samples: list[Sample], **labels: str) -> float:
    return sum(value for have, value in samples if labels.items() <= have.items())


async def ask(
    http: httpx.AsyncClient, *contents: str, max_tokens: int, stream: bool = False, **fields: Any
) -> dict[str, Any]:
    """The usage that the client is told.

    contents: what the user and the assistant say in turn. fields: of the body, besides.
    """
    body = (
        {
            "model": EMBEDDED_MODEL_NAME,
            "messages": [
                {"role": "assistant" if number % 2 else "user", "content": content}
                for number, content in enumerate(contents)
            ],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": stream,
        }
        | ({"stream_options": {"include_usage": True}} if stream else {})
        | fields
    )
    response = await http.post("/v1/chat/completions", json=body, headers={"x-session-id": "session"})
    assert response.status_code == 200, response.text
    if not stream:
        return response.json()["usage"]
    *_, last, _ = [line for line in response.text.splitlines() if line]
    return json.loads(last.removeprefix("data: "))["usage"]


async def scrape(url: str) -> dict[str, list[Sample]]:
    """Samples by name, of all but this process."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        samples = parse((await http.get(url)).text)
    # This process is on the node too, and other tests may have made metrics in it; they belong to no replica.
    for name, found in samples.items():
        samples[name] = [sample for sample in found if sample[0].get("replica") != ""]
    return samples


def outcomes(samples: dict[str, list[Sample]]) -> float:
    return total(samples["ray_pensieve_requests_total"])


async def test_everything_is_exported(urls: tuple[str, str]) -> None:
    base_url, metrics_url = urls
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http:
        usages = [await ask(http, "hello", max_tokens=8, prompt_cache_options={"ttl": "30m"})]
        usages += [await ask(http, "hello", "not what it said", "and now?", max_tokens=8)]
        # One session, three at once: two fill its home, where both do not fit the GPU tier; the third spills over.
        usages += await asyncio.gather(*(ask(http, f"{i} " * 150, max_tokens=300, stream=i == 0) for i in range(3)))
        usages += [await ask(http, f"{i} " * 150, max_tokens=300) for i in range(3)]

    end = time.monotonic() + PATIENCE_S
    while outcomes(samples := await scrape(metrics_url)) < len(usages):  # they are reported every now and then
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.5)

    for definition in METRICS:
        if definition.name in NOT_COUNTED:
            continue
        name = f"ray_{definition.name}" + ("_count" if definition.kind == "histogram" else "")
        assert samples[name], f"{name} is not exported"
        for labels, _ in samples[name]:
            assert {*definition.labels, "application", "deployment", "replica"} <= set(labels)
            assert labels["application"] == "pensieve"

    def value(name: str, **labels: str) -> float:
        return total(samples[f"ray_pensieve_{name}"], **labels)

    num_prompt = sum(usage["prompt_tokens"] for usage in usages)
    num_cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert value("requests_total", outcome="finished") == value("requests_total") == len(usages)
    assert value("prompt_tokens_total") == num_prompt
    assert value("generation_tokens_total") == sum(usage["completion_tokens"] for usage in usages)
    assert value("cached_tokens_total") == num_cached > 0
    assert value("recomputed_tokens_total") == num_prompt - num_cached
    assert value("suspensions_total") >= 1
    assert value("swap_bytes_total", direction="out") > 0
    assert value("evictions_total", tier="gpu") > 0
    assert value("changed_history_tokens_total", reason="edited") == value("changed_history_tokens_total") > 0
    assert value("num_requests_running") == value("num_requests_waiting") == 0
    assert value("kv_blocks", tier="gpu") == ARGS.num_replicas * ARGS.engine["num_gpu_blocks"]
    assert value("kv_blocks", state="pinned") == 0
    assert value("cache_hints_total", outcome="accepted") == value("cache_hints_total") == 1
    assert value("kv_blocks", tier="gpu", state="used") > 0
    assert value("tier_usable", tier="disk") == ARGS.num_replicas
    assert value("tier_written_bytes_total", tier="disk", content="transcripts") > 0
    assert value("router_decisions_total", kind="new") == 1
    assert value("router_decisions_total", kind="spill") == 1
    assert value("router_decisions_total", kind="sticky") == len(usages) - 2
    assert value("router_decisions_total", deployment="Ingress") == len(usages)
    assert value("time_to_first_token_seconds_count") == value("e2e_request_latency_seconds_count") == len(usages)
    assert value("inter_token_latency_seconds_count") > len(usages)

    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http:
        answer = await http.get("/metrics")
    on_http_port = parse(answer.text)
    assert "did not answer" not in answer.text
    assert total(on_http_port["ray_pensieve_requests_total"], outcome="finished") == len(usages)
    assert {name for name in samples if name.startswith("ray_pensieve_")} <= set(on_http_port)
    assert all(labels["application"] == "pensieve" for found in on_http_port.values() for labels, _ in found)

    used_of_ray = set(re.findall(r"ray_serve_\w+", DASHBOARD.read_text()))
    assert used_of_ray
    assert used_of_ray <= set(samples), "Ray's own metrics in the dashboard bear other names now"
