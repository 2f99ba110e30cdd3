"""Clients from the registries, unmodified, against the application over an engine; `catalogue.py` lists them.

PENSIEVE_URL names a server that runs already, to try them against that instead. Some compare answers to one prompt, which in
bfloat16 may differ by rounding; and some clients raise an error if a small model does not end its answer before max_tokens.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from engine.model_files import has_smollm2, model_location
from tests.clients.catalogue import CLIENTS, Client
from tests.clients.environments import command
from tests.deployments.engine_here import EngineHere
from tests.deployments.serving import serving
from tests.nightly import IS_NIGHTLY, nightly

pytestmark = pytest.mark.slow

# The nightly scripts have prompts of thousands of tokens, which are too much for the small model's window.
MODEL = os.environ.get("PENSIEVE_CLIENTS_MODEL") or ("smollm2" if IS_NIGHTLY and has_smollm2() else "embedded-tools")
OPTIONS = {"model": MODEL, "dtype": "float32", "num_threads": 1, "gpu_memory_gib": 1.0}
# A client that cannot go on without its model's home, or that tells its maker of each run, is kept from it.
ENVIRONMENT = {
    "OPENAI_API_KEY": "none",
    "ANTHROPIC_API_KEY": "none",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "NO_COLOR": "1",
    "PYTHONUNBUFFERED": "1",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the one server that all scripts talk to."""
    if there := os.environ.get("PENSIEVE_URL"):
        yield there.rstrip("/")
        return
    store_url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'conversations.db'}"
    engines: list[EngineHere] = []

    async def make_app() -> FastAPI:
        engines.append(EngineHere(EngineConfig.from_options(OPTIONS), stream_interval_s=0.0))
        return create_app(engines[0], IngressConfig(store_url=store_url), ingress_id="ingress-1")

    async def end() -> None:
        await engines[0].check_integrity()
        await engines[0].__del__()

    with serving(make_app, end) as address:
        yield address


@pytest.mark.parametrize(
    "client", [pytest.param(each, id=each.name, marks=[] if each.is_light else nightly) for each in CLIENTS]
)
@pytest.mark.timeout(3600)  # the first run installs packages
def test_client(client: Client, url: str, tmp_path: Path) -> None:
    arguments = command(client)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_"))}
    environment = inherited | ENVIRONMENT | {
        "OPENAI_BASE_URL": f"{url}/v1",
        "ANTHROPIC_BASE_URL": url,
        "MODEL": httpx.get(f"{url}/v1/models").json()["data"][0]["id"],
        "TOKENIZER": model_location(MODEL),
        "HOME": str(tmp_path),
    }  # fmt: skip
    try:
        ran = subprocess.run(
            arguments,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=client.timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as hangs:
        pytest.fail(f"{client.name} did not end within {client.timeout_s} s:\n{hangs.stdout!r}\n{hangs.stderr!r}")
    print(ran.stdout)
    assert ran.returncode == 0, f"{client.name}: {ran.stdout}\n{ran.stderr}"
