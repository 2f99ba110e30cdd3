"""pensieve-serve as an operator uses it: a bad file is refused, signals drain."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import yaml

from deployments import run
from engine.embedded_model import EMBEDDED_MODEL_NAME
from tests.nightly import nightly

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


def test_a_bad_file_is_refused_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    config = yaml.safe_load(CONFIG.read_text())
    config["applications"][0]["args"]["max_ongoing_request"] = 3
    config["htp_options"] = {}
    path.write_text(yaml.safe_dump(config))
    assert run.main([str(path)]) == 2
    printed = capsys.readouterr().err
    assert "htp_options: unknown key" in printed
    assert "max_ongoing_request" in printed
    assert run.main([str(tmp_path / "nothing.yaml")]) == 2
    assert "nothing.yaml" in capsys.readouterr().err


def test_the_fast_path_needs_keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(run, "_run", lambda config: started.append(config) or 0)
    for name in run.FAST_PATH:  # to be put back
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("PENSIEVE_API_KEY", raising=False)
    assert run.main(["--fast-path", str(CONFIG)]) == 2
    assert "PENSIEVE_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("PENSIEVE_API_KEY", "sk-a")
    assert run.main(["--fast-path", str(CONFIG)]) == 0
    assert started == [str(CONFIG)]


def test_a_key_that_the_cluster_would_not_see_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application is built on the cluster's nodes, and without keys it would serve all their users."""
    monkeypatch.setattr(run, "_run", lambda config: 0)
    monkeypatch.setenv("PENSIEVE_API_KEY", "sk-a")
    for name in run.DEFAULTS:  # to be put back
        monkeypatch.setenv(name, run.DEFAULTS[name])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert run.main([str(CONFIG)]) == 2
    assert "args.tenants_file" in capsys.readouterr().err
    assert run.main(["nothing.yaml"]) == 2
    printed = capsys.readouterr().err
    assert "nothing.yaml" in printed  # what else is wrong is told too
    assert "args.tenants_file" in printed
    for address in ("local", None):
        monkeypatch.delenv("RAY_ADDRESS") if address is None else monkeypatch.setenv("RAY_ADDRESS", address)
        assert run.main([str(CONFIG)]) == 0


@pytest.mark.parametrize(("address", "arguments"), [(None, ["--address", "local"]), ("10.0.0.1:6379", [])])
def test_it_starts_a_ray_of_its_own_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str | None, arguments: list[str]
) -> None:
    """And leaves alone what else runs on the machine."""
    calls: list[list[str]] = []
    monkeypatch.setattr("ray.serve.scripts.cli", calls.append)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    run.serve_run("config.yaml")
    assert calls == [["run", *arguments, "config.yaml"]]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """The process, and where it listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = port
    application = config["applications"][0]
    application["args"]["store_url"] = f"sqlite:///{tmp_path / 'conversations.db'}"
    application["deployments"][0]["num_replicas"] = 1
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with open(tmp_path / "output.txt", "wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "deployments.run", str(path)], stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(120), httpx.AsyncClient() as http:
            while True:
                try:
                    if (await http.get(f"{url}/ready")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert process.poll() is None, (tmp_path / "output.txt").read_text()
                await asyncio.sleep(0.2)
        yield process, url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=nightly)], ids=lambda n: n.name)
async def test_a_signal_lets_running_requests_end(
    server: tuple[subprocess.Popen[bytes], str], number: signal.Signals
) -> None:
    process, url = server
    body = {"model": EMBEDDED_MODEL_NAME, "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        async with http.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True, "max_tokens": 600}
        ) as response:
            lines = response.aiter_lines()
            for _ in range(10):
                await anext(lines)
            process.send_signal(number)
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
    assert await asyncio.to_thread(process.wait, 60) == 0
