"""Two models in one application on a real cluster, one of them scaled up by the tokens that wait."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe
from tests.nightly import nightly

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHARED_SERVE = AS_PENSIEVE_SERVE
APP = "models"
# Far longer than anything here takes; only a defect waits for it.
PATIENCE_S = 300.0
KWARGS = {"num_threads": 1, "num_gpu_blocks": 256, "num_cpu_blocks": 0, "dtype": "float32"}
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 1,
    "upscale_delay_s": 0,
    "policy": {
        "policy_function": "deployments.cluster.autoscaling:TokensAndKV",
        "policy_kwargs": {"target_waiting_tokens": 4},
    },
}


@pytest.fixture
def base_url(local_serve: LocalServe) -> Iterator[str]:
    yield local_serve.start(SHARED_SERVE)
    serve.delete(APP)


def entry(name: str, **deployment: Any) -> dict[str, Any]:
    return {
        "model_loading_config": {"model_id": name, "model_source": "embedded"},
        "accelerator_config": {"kind": "cpu"},
        "engine_kwargs": {**KWARGS, "max_num_seqs": 1},
        "deployment_config": {"ray_actor_options": {"num_cpus": 0.3}, "graceful_shutdown_timeout_s": 2, **deployment},
    }


def is_running() -> bool:
    application = serve.status().applications.get(APP)
    return application is not None and application.status == "RUNNING"


def num_replicas(name: str) -> int:
    states = serve.status().applications[APP].deployments[f"LLMServer:{name}"].replica_states
    return int(states.get("RUNNING", 0))


@nightly
async def test_models_have_replicas_of_their_own_and_scale_alone(base_url: str, tmp_path: Path) -> None:
    args = {
        "llm_configs": [entry("steady", num_replicas=1), entry("org/scaled", autoscaling_config=SCALING)],
        "ingress_num_cpus": 0.2,
        "store_url": f"sqlite:///{tmp_path / 'store.db'}",
    }
    application = {"name": APP, "route_prefix": "/", "import_path": "deployments.app:build_openai_app", "args": args}
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}), _blocking=False)
    async with (
        asyncio.timeout(PATIENCE_S),
        httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http,
    ):
        while not await asyncio.to_thread(is_running):
            await asyncio.sleep(0.2)
        assert (await http.get("/ready")).status_code == 200
        listed = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["steady", "org/scaled"]

        async def ask(model: str, num_tokens: int, session: str = "s") -> httpx.Response:
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": num_tokens}
            headers = {"x-session-id": session}
            return await http.post("/v1/chat/completions", json=body | {"ignore_eos": True}, headers=headers)

        assert (await ask("other", 4)).json()["error"]["code"] == "model_not_found"
        for model in ("steady", "org/scaled"):
            answer = (await ask(model, 4)).json()
            assert (answer["model"], answer["usage"]["completion_tokens"]) == (model, 4)

        is_over = asyncio.Event()

        async def keep_asking(session: str) -> None:
            while not is_over.is_set():
                assert (await ask("org/scaled", 200, session)).status_code == 200

        askers = [asyncio.create_task(keep_asking(str(number))) for number in range(6)]
        while await asyncio.to_thread(num_replicas, "org--scaled") < 2:
            assert not any(asker.done() for asker in askers)
            await asyncio.sleep(0.2)
        is_over.set()
        await asyncio.gather(*askers)
        assert await asyncio.to_thread(num_replicas, "steady") == 1
