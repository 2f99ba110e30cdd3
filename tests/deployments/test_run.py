"""pensieve-serve as an operator uses it: mistakes are told first, signals drain, Ray's end is its end."""

from __future__ import annotations

import asyncio
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray.serve._private import constants
from ray.serve.schema import LoggingConfig

from deployments import run
from deployments.cluster import ray_settings
from engine.embedded_model import EMBEDDED_MODEL_NAME
from engine.host_memory import GIB, HostMemory
from tests.deployments.serve_process import CONFIG, END_S, ServeProcess, free_port, in_session
from tests.nightly import nightly


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been started; the environment is put back, and has no token and no other Ray."""
    started: list[str] = []
    monkeypatch.setattr(run, "_run", lambda config, *, has_dashboard: started.append(config) or 0)
    monkeypatch.setattr("os.environ", {**run.os.environ})
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "PENSIEVE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return started


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """serve_config.yaml with a free port and the recall model."""
    content = yaml.safe_load(CONFIG.read_text())
    content["http_options"]["port"] = free_port()
    content["applications"][0]["args"]["engine"]["model"] = "embedded"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is printed for a mistake."""
    try:
        status = run.main(arguments)
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


def test_all_that_is_wrong_with_a_file_is_told_at_once(
    config: Path, capsys: pytest.CaptureFixture[str], nothing_starts: list[str]
) -> None:
    content = yaml.safe_load(config.read_text())
    content["applications"][0]["args"] |= {"num_cpu": 3, "colour": "blue"}
    content["htp_options"] = {}
    config.write_text(yaml.safe_dump(content))
    printed = refusal(capsys, str(config))
    assert "htp_options: unknown key; did you mean http_options?" in printed
    assert "applications[0].args.num_cpu: unknown key; did you mean num_cpus?" in printed
    assert (
        "applications[0].args.colour: unknown key; known are accelerator_type, cors_allowed_origins, demo, engine"
        in printed
    )
    assert len(printed.splitlines()) == 3
    assert nothing_starts == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: 1\nb: [1, 2\nc: 3\n", "line 3, column 2: is not YAML"),
        (b"a:\n\t- 1\n", "line 2, column 1: is not YAML"),
        (b"a: \x07\n", "is not YAML"),
        (b"", "is empty"),
        (b"# nothing but this\n", "is empty"),
        (b"- a\n- b\n", "is 'list' and not a mapping"),
        (b"serve\n", "is 'str' and not a mapping"),
        (b"a: \xff\n", "is not text in UTF-8"),
        (b"applications: 3\n", "applications: Input should be a valid list"),
    ],
)
def test_what_is_no_config_file_is_one_line(
    content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    printed = refusal(capsys, str(path))
    assert expected in printed
    assert len(printed.splitlines()) == 1


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.yaml: No such file or directory; name a Serve config file" in refusal(
        capsys, str(tmp_path / "nothing.yaml")
    )
    assert f"{tmp_path}: Is a directory" in refusal(capsys, str(tmp_path))


def test_a_port_in_use_is_told_before_anything_starts(
    config: Path, capsys: pytest.CaptureFixture[str], nothing_starts: list[str]
) -> None:
    content = yaml.safe_load(config.read_text())
    for own, other in (("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as another Serve does
            sock.bind((other, 0))
            sock.listen()
            port = sock.getsockname()[1]
            config.write_text(yaml.safe_dump(content | {"http_options": {"host": own, "port": port}}))
            assert f"cannot listen on {own}:{port} (Address already in use)" in refusal(capsys, str(config))
    config.write_text(yaml.safe_dump(content | {"http_options": {"host": "192.0.2.77", "port": 8000}}))
    assert "cannot listen on 192.0.2.77:8000 (Cannot assign requested address)" in refusal(capsys, str(config))
    assert nothing_starts == []
    for harmless in ({"proxy_location": "Disabled"}, {"http_options": {"host": "127.0.0.1", "port": free_port()}}):
        config.write_text(yaml.safe_dump(content | {"http_options": {"host": "192.0.2.77"}} | harmless))
        assert run.main([str(config)]) == 0


@pytest.mark.parametrize(
    ("engine", "args", "total_gib", "is_refused"),
    [
        ({}, {}, 1.9, True),
        ({}, {}, 2.0, False),
        ({"gpu_memory_gib": 50}, {}, 40, True),
        ({"gpu_memory_gib": 50}, {"num_gpus": 1}, 40, False),
        ({"kv_offloading_size": 50}, {"num_gpus": 1}, 40, True),
        ({"kv_offloading_size": 50, "mode": "stateless"}, {}, 40, False),
        ({"num_gpu_blocks": 1000, "num_cpu_blocks": 1000}, {}, 1.0, True),
        ({"num_gpu_blocks": 1000, "num_cpu_blocks": 1000}, {}, 1.1, False),
    ],
)
def test_too_little_memory_is_told_before_anything_starts(
    engine: dict[str, Any],
    args: dict[str, Any],
    total_gib: float,
    is_refused: bool,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nothing_starts: list[str],
) -> None:
    content = yaml.safe_load(config.read_text())
    application = content["applications"][0]
    application["args"] |= {"engine": application["args"]["engine"] | engine, **args}
    config.write_text(yaml.safe_dump(content))
    memory = HostMemory(int(total_gib * GIB), GIB)
    monkeypatch.setattr("engine.host_memory.host_memory", lambda: memory)
    assert run.main([str(config)]) == (2 if is_refused else 0)
    assert bool(nothing_starts) != is_refused
    if is_refused:
        (line,) = capsys.readouterr().err.splitlines()
        assert f"this process can use {total_gib:.1f} GiB, of which 1.0 are free; lower gpu_memory_gib" in line


def test_another_clusters_ports_are_not_this_machines(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(content | {"http_options": {"host": "192.0.2.77"}}))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert run.main([str(config)]) == 0


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--fast-pat", "unrecognized argument '--fast-pat'; did you mean --fast-path?"),
        ("--fastpath=1", "unrecognized argument '--fastpath=1'; did you mean --fast-path?"),
        ("--quick", "unrecognized argument '--quick'\n"),
        ("more.yaml", "unrecognized argument 'more.yaml'\n"),
    ],
)
def test_options_are_not_guessed(option: str, expected: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, str(config), option).endswith(expected if expected.endswith("\n") else f"{expected}\n")


def test_serve_knows_the_names_of_its_settings() -> None:
    """One that Serve does not read any more would have no effect, and nothing would say so."""
    source = Path(constants.__file__).read_text()
    names = [name for name in {**ray_settings.DEFAULTS, **ray_settings.FAST_PATH} if name.startswith("RAY_SERVE_")]
    assert [name for name in names if f'"{name}"' not in source] == []
    assert float(ray_settings.DEFAULTS["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) >= constants.HTTP_PROXY_TIMEOUT


def test_help_loads_nothing_large() -> None:
    program = """
import sys
from deployments.run import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print(sorted({"ray", "torch", "transformers", "pydantic", "sqlalchemy", "fastapi"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: pensieve-serve [-h] [--fast-path] config")
    assert done.stdout.endswith("[]\n")


def test_the_fast_path_needs_keys(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nothing_starts: list[str]
) -> None:
    assert "PENSIEVE_API_KEY" in refusal(capsys, "--fast-path", str(config))
    monkeypatch.setenv("PENSIEVE_API_KEY", "sk-a")
    assert run.main(["--fast-path", str(config)]) == 0
    assert nothing_starts == [str(config)]
    assert {run.os.environ[name] for name in run.FAST_PATH} == {"1"}


def test_a_key_that_the_cluster_would_not_see_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application is built on the cluster's nodes, and without keys it would serve all their users."""
    monkeypatch.setenv("PENSIEVE_API_KEY", "sk-a")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "args.tenants_file" in refusal(capsys, str(config))
    printed = refusal(capsys, "nothing.yaml")
    assert "nothing.yaml" in printed  # what else is wrong is told too
    assert "args.tenants_file" in printed
    for address in ("local", None):
        monkeypatch.delenv("RAY_ADDRESS") if address is None else monkeypatch.setenv("RAY_ADDRESS", address)
        assert run.main([str(config)]) == 0


# -- Ray's token -------------------------------------------------------------------------------------------------------


def test_each_start_has_a_token_of_its_own(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = set()
    for _ in range(2):
        run.os.environ.pop("RAY_AUTH_TOKEN", None)
        assert run.main([str(config)]) == 0
        assert run.os.environ["RAY_AUTH_MODE"] == "token"
        tokens.add(run.os.environ["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2
    assert {len(token) for token in tokens} == {64}
    printed = capsys.readouterr()
    assert "docs/security.md" in printed.out
    assert not any(token in printed.out + printed.err for token in tokens)


@pytest.mark.parametrize(
    ("environment", "has_dashboard"),
    [({}, False), ({"RAY_AUTH_TOKEN": "mine"}, True), ({"RAY_AUTH_MODE": "disabled"}, True)],
)
def test_the_dashboard_is_for_those_who_have_a_token(
    environment: dict[str, str], has_dashboard: bool, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(run, "_run", lambda config, *, has_dashboard: seen.append(has_dashboard) or 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run.main([str(config)]) == 0
    assert seen == [has_dashboard]


def test_to_do_without_a_token_is_warned_of(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert run.main([str(config)]) == 0
    assert "RAY_AUTH_TOKEN" not in run.os.environ
    assert "can run code on this machine" in capsys.readouterr().err


LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@pytest.mark.parametrize(
    ("environment", "added"),
    [
        ({"RAY_AUTH_TOKEN": "mine"}, LOCAL | {"RAY_AUTH_MODE": "token"}),
        ({"RAY_AUTH_TOKEN_PATH": "file"}, LOCAL | {"RAY_AUTH_MODE": "token"}),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"}, LOCAL | {"RAY_AUTH_MODE": "token"}),
        ({"RAY_AUTH_MODE": "disabled"}, LOCAL),
        ({"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}, LOCAL),
        ({"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ""}, LOCAL),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, {}),
        ({"RAY_ADDRESS": "auto"}, {}),
    ],
)
def test_a_token_that_is_given_and_a_cluster_that_is_named_are_left_alone(
    environment: dict[str, str], added: dict[str, str]
) -> None:
    assert ray_settings.guard(environment) == added


def test_a_token_file_that_cannot_be_used_is_told(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert f"RAY_AUTH_TOKEN_PATH: {path} cannot be read" in refusal(capsys, str(config))
    path.write_text("\n")
    assert f"RAY_AUTH_TOKEN_PATH: {path} is empty" in refusal(capsys, str(config))
    path.write_text("a" * 64)
    assert run.main([str(config)]) == 0
    assert "RAY_AUTH_TOKEN" not in run.os.environ


# -- ready, or never ---------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_model_is_told_before_anything_starts(
    config: Path, capfd: pytest.CaptureFixture[str], nothing_starts: list[str], tmp_path: Path
) -> None:
    content = yaml.safe_load(config.read_text())
    content["applications"][0]["args"]["engine"]["model"] = str(tmp_path)
    config.write_text(yaml.safe_dump(content))
    assert run.main([str(config)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "is a folder without a config.json" in line
    assert nothing_starts == []


class Process:
    """What `announce` needs of one that runs."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.send_signal = self.signals.append

    def poll(self) -> int | None:
        return None


@pytest.mark.parametrize(
    ("answers", "expected", "signals"),
    [
        ([(503, "no_replica"), (200, "")], "ready at ", []),
        ([(503, "no_replica"), (503, "model_not_loaded")], "pensieve-serve: why model_not_loaded", [signal.SIGINT]),
    ],
)
def test_the_url_is_printed_when_all_is_ready_or_why_it_never_will_be(
    answers: list[tuple[int, str]], expected: str, signals: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

        def do_GET(self) -> None:
            status, code = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"error": {"message": f"why {code}", "code": code}}).encode())

    process, failed = Process(), threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        run.announce(f"http://127.0.0.1:{server.server_address[1]}/", process, failed)  # type: ignore[arg-type]
        server.shutdown()
        thread.join()
    printed = capsys.readouterr()
    assert expected in printed.out + printed.err
    assert process.signals == signals
    assert failed.is_set() == bool(signals)
    assert answers == []


# -- Ray and its end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_dashboard", [True, False])
@pytest.mark.parametrize("address", [None, "local", "10.0.0.1:6379"])
def test_it_starts_a_ray_of_its_own_unless_one_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, has_dashboard: bool
) -> None:
    """And leaves alone what else runs on the machine. Serve there gets what the file says of its logs."""
    calls: list[object] = []
    monkeypatch.setattr("ray.init", lambda *arguments, **options: calls.append((*arguments, *options.values())))
    monkeypatch.setattr("deployments.cluster.serve_start.list_metrics_ports", lambda: calls.append("ports"))
    monkeypatch.setattr("ray.serve.scripts.cli", calls.append)
    monkeypatch.setattr(run, "_DaemonWatch", NoWatch)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.serve.start", lambda *, logging_config, **options: calls.append(logging_config))
    run.serve_run(str(config), has_dashboard=has_dashboard)
    started: list[object] = []
    if address in (None, "local"):
        # Prometheus finds the metrics either way.
        started = [("local", "serve", has_dashboard), *([] if has_dashboard else ["ports"])]
        started.append(LoggingConfig(enable_access_log=False))
    assert calls == [*started, ["run", str(config)]]


def test_a_signal_before_ray_runs_reaches_no_other_ray(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve.delete` connects to any Ray that it finds on the machine."""
    deleted: list[str] = []
    monkeypatch.setattr("ray.serve.delete", deleted.append)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    run._drain(str(config))
    assert deleted == []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    run._drain(str(config))
    assert deleted == ["pensieve"]


class NoWatch:
    def stop(self) -> None: ...


@pytest.mark.parametrize(("status", "expected"), [(None, 1), (0, 1), (3, 3)])
def test_an_end_that_was_not_asked_for_is_an_error(
    monkeypatch: pytest.MonkeyPatch, status: int | None, expected: int
) -> None:
    """`serve run` ends with 0 after an error that it printed."""

    def fail(arguments: list[str]) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("ray.init", lambda address, **options: None)
    monkeypatch.setattr("ray.serve.scripts.cli", fail)
    monkeypatch.setattr(run, "_DaemonWatch", NoWatch)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr("deployments.cluster.serve_start.start_serve", lambda config: None)
    with pytest.raises(SystemExit) as end:
        run.serve_run(str(CONFIG), has_dashboard=True)
    assert end.value.code == expected


def test_what_a_session_leaves_behind_is_killed() -> None:
    """Also what ignores signals, and what has a process group of its own, as Ray's workers do; and nothing else."""
    program = """
import os, signal, subprocess, sys
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
left = [subprocess.Popen(sleep, stdout=subprocess.DEVNULL, process_group=group) for group in (None, 0)]
print(*(process.pid for process in left))
"""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        leader = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
        printed, _ = leader.communicate()
        left = [int(pid) for pid in printed.split()]
        assert {process.pid for process in in_session(leader.pid)} == set(left)
        run._end_session(leader.pid)
        assert in_session(leader.pid) == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServeProcess]:
    server = ServeProcess(tmp_path)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=nightly)], ids=lambda n: n.name)
async def test_a_signal_lets_running_requests_end(server: ServeProcess, number: signal.Signals) -> None:
    session = server.session
    body = {"model": EMBEDDED_MODEL_NAME, "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    async with httpx.AsyncClient(base_url=server.url, timeout=END_S) as http:
        async with http.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True, "max_tokens": 600}
        ) as response:
            lines = response.aiter_lines()
            for _ in range(10):
                await anext(lines)
            server.process.send_signal(number)
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
    assert await asyncio.to_thread(server.wait) == 0
    assert in_session(session) == []
    for frightening in ("Traceback", "rror", "fail", "infinite retries"):
        assert frightening not in server.output, server.output


@pytest.mark.ray
@pytest.mark.slow
@nightly
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_without_rays_daemons_it_ends_with_an_error_and_leaves_nothing(server: ServeProcess, name: str) -> None:
    """Instead of a proxy that accepts connections and never answers."""
    session = server.session
    daemon = server.daemon(name)
    daemon.kill()
    assert server.wait() == 1
    assert f"Ray's {name} (process {daemon.pid}) has ended" in server.output
    assert in_session(session) == []
    with socket.socket() as sock:  # the port is free for the next start
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))


@pytest.mark.ray
@pytest.mark.slow
@nightly
def test_it_drains_when_its_parent_is_gone(server: ServeProcess) -> None:
    """As after `kill -9` of pensieve-serve itself."""
    session = server.session
    server.process.kill()
    server.wait()
    left = in_session(session)
    _, alive = psutil.wait_procs(left, timeout=END_S)
    assert alive == []
    assert "draining: running requests may end" in server.output
