"""Every expression of our Grafana dashboard gives data under a mixed load, to a Prometheus that scrapes a real cluster."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve

from deployments.app import build
from deployments.cluster.serve_start import list_metrics_ports
from deployments.dashboards.files import OWN_DASHBOARD
from engine.embedded_model import EMBEDDED_MODEL_NAME
from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe, free_port, start_ray
from tests.deployments.test_metrics_endpoint import ARGS as SMALL
from tests.nightly import nightly

pytestmark = [
    pytest.mark.ray,
    nightly,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (apt-get install prometheus)"),
]

# Tiers for a window and a half, and for less than the conversations have: they go to the disk and come back.
_ENGINE = {name: value for name, value in SMALL.engine.items() if name != "kv_offloading_size"}
ARGS = SMALL.model_copy(
    update={"engine": {**_ENGINE, "num_cpu_blocks": 40, "max_num_queued_reqs": 2}, "max_ongoing_requests": 6}
)
NUM_ROUNDS = 6
INTERVAL_S = 1
PATIENCE_S = 120.0
# Parts of expressions that may give nothing on such a cluster, and why.
MAY_BE_EMPTY: dict[str, str] = {
    "pensieve_handover_conversations_total": "no replica is stopped or started, and sessions return to their homes",
    "pensieve_guessed_tokens_total": "speculation is off, as by default",
    "pensieve_accepted_tokens_total": "speculation is off, as by default",
}


@pytest.fixture(scope="module")
def urls(local_serve: LocalServe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Of the server, and of a Prometheus that looks at it every second."""
    local_serve.stop()
    folder = tmp_path_factory.mktemp("promql")
    http_port, prometheus_port = free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AS_PENSIEVE_SERVE.items():
            patch.setenv(name, value)
        start_ray(_system_config={"metrics_report_interval_ms": 1000})
        prometheus = None
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": http_port})
            engine = ARGS.engine | {"kv_disk_path": str(folder / "kv"), "kv_disk_size": 0.05}
            serve.run(build(ARGS.model_copy(update={"engine": engine})), name="pensieve", route_prefix="/")
            job = {"job_name": "ray", "file_sd_configs": [{"files": [str(list_metrics_ports())]}]}
            config = {"global": {"scrape_interval": f"{INTERVAL_S}s"}, "scrape_configs": [job]}
            (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
            with (folder / "prometheus.log").open("wb") as log:
                prometheus = subprocess.Popen(
                    [
                        "prometheus",
                        f"--config.file={folder / 'prometheus.yml'}",
                        f"--storage.tsdb.path={folder / 'data'}",
                        f"--web.listen-address=127.0.0.1:{prometheus_port}",
                    ],
                    stdout=log,
                    stderr=log,
                )
            yield f"http://127.0.0.1:{http_port}", f"http://127.0.0.1:{prometheus_port}"
        finally:
            if prometheus is not None:
                prometheus.terminate()
                prometheus.wait(10)
            ray.shutdown()


async def ask(http: httpx.AsyncClient, session: str, messages: list[Any], **fields: Any) -> httpx.Response:
    body = {"model": EMBEDDED_MODEL_NAME, "messages": messages, "ignore_eos": True, "max_tokens": 40, **fields}
    return await http.post("/v1/chat/completions", json=body, headers={"x-session-id": session})


async def converse(http: httpx.AsyncClient, name: str, length: int) -> None:
    """Two turns, of which the second one has another history in every other conversation."""
    messages = [{"role": "user", "content": f"{name} " * length}]
    first = await ask(http, name, messages, max_tokens=120, prompt_cache_options={"ttl": "30m"})
    if first.status_code == 200:
        said = first.json()["choices"][0]["message"]["content"] if length % 2 else "something else"
        await ask(http, name, [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "and?"}])


async def abort(http: httpx.AsyncClient, name: str) -> None:
    with suppress(httpx.TimeoutException):
        messages = [{"role": "user", "content": "hello"}]
        await asyncio.wait_for(ask(http, name, messages, max_tokens=500, stream=True), 0.3)


async def load(url: str) -> None:
    """Rounds of the same conversations, so that they come back from all tiers; some clients leave, some are refused."""
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
        for _ in range(NUM_ROUNDS):
            with suppress(TimeoutError):
                await asyncio.gather(
                    *(converse(http, f"session {number}", 40 + number) for number in range(10)),
                    *(ask(http, "hot", [{"role": "user", "content": f"{n} " * 100}]) for n in range(8)),
                    abort(http, "leaves"),
                )
            await asyncio.sleep(1)


def expressions() -> list[str]:
    panels = json.loads(OWN_DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


async def test_every_expression_of_the_dashboard_gives_data(urls: tuple[str, str]) -> None:
    url, prometheus_url = urls
    start_s = time.time()
    await load(url)
    await asyncio.sleep(5)  # until Ray has reported the last of it
    empty = []
    async with httpx.AsyncClient(base_url=prometheus_url, timeout=PATIENCE_S, trust_env=False) as prometheus:
        for expression in expressions():
            query = (
                expression.replace("$__rate_interval", "30s").replace("$application", ".*").replace("$replica", ".*")
            )
            parameters = {"query": query, "start": start_s, "end": time.time(), "step": INTERVAL_S}
            answer = (await prometheus.get("/api/v1/query_range", params=parameters)).json()
            assert answer["status"] == "success", (expression, answer)
            values = [value for series in answer["data"]["result"] for _, value in series["values"]]
            if all(value == "NaN" for value in values):
                empty.append(expression)
    unexpected = [expr for expr in empty if not any(part in expr for part in MAY_BE_EMPTY)]
    assert unexpected == []


def test_every_exception_is_of_an_expression() -> None:
    assert all(any(part in expression for expression in expressions()) for part in MAY_BE_EMPTY)
