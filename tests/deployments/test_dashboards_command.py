"""`pensieve dashboards` as a process: what it writes, starts, ends and says, with a program that stands in for Prometheus."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.deployments.local_ray import free_port

# Writes its process id and its arguments, and waits to be ended.
PROMETHEUS = """#!{python}
import json, os, sys, time
open({seen!r} + ".new", "w").write(json.dumps([os.getpid(), *sys.argv[1:]]))
os.rename({seen!r} + ".new", {seen!r})
time.sleep({seconds})
"""
PATIENCE_S = 60.0


@pytest.fixture
def session(tmp_path: Path) -> Path:
    folder = tmp_path / "session_1"
    folder.mkdir()
    (folder / "prom_metrics_service_discovery.json").write_text("[]")
    latest = tmp_path / "session_latest"
    latest.symlink_to(folder)
    return latest


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def install(folder: Path, seconds: float = 600.0) -> Path:
    """A program named prometheus, and the file that it writes."""
    seen = folder / "seen.json"
    program = folder / "prometheus"
    program.write_text(PROMETHEUS.format(python=sys.executable, seen=str(seen), seconds=seconds))
    program.chmod(0o755)
    return seen


def start(installed: Path, *options: object) -> subprocess.Popen[str]:
    """Nothing else is installed."""
    return subprocess.Popen(
        [sys.executable, "-m", "deployments.dashboards.command", *map(str, options)],
        env={**os.environ, "PATH": str(installed)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_writes_what_prometheus_and_grafana_need_runs_prometheus_and_ends_it(session: Path, installed: Path) -> None:
    seen, port = install(installed), free_port()
    process = start(installed, "--session", session, "--prometheus-port", port)
    end_s = time.monotonic() + PATIENCE_S
    while not seen.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.05)
    pid, *arguments = json.loads(seen.read_text())
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert not psutil.pid_exists(pid)

    folder = session.resolve() / "pensieve_dashboards"
    assert f"--config.file={folder / 'prometheus.yml'}" in arguments
    assert f"--web.listen-address=127.0.0.1:{port}" in arguments
    (job,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    # The session's own folder: session_latest is another one when another Ray starts.
    assert job["file_sd_configs"][0]["files"] == [str(session.resolve() / "prom_metrics_service_discovery.json")]
    (source,) = yaml.safe_load((folder / "grafana/provisioning/datasources/default.yml").read_text())["datasources"]
    assert source["url"] == f"http://127.0.0.1:{port}"
    (provider,) = yaml.safe_load((folder / "grafana/provisioning/dashboards/default.yml").read_text())["providers"]
    dashboards = {json.loads(path.read_text())["uid"] for path in Path(provider["options"]["path"]).iterdir()}
    assert dashboards >= {"pensieve", "rayDefaultDashboard", "rayServeDashboard"}
    assert f"export RAY_PROMETHEUS_HOST=http://127.0.0.1:{port}\n" in (folder / "ray.env").read_text()
    assert "Grafana is not installed" in errors
    assert f"RAY_PROMETHEUS_HOST=http://127.0.0.1:{port}" in output


@pytest.mark.parametrize("case", ["it ends", "nothing is installed", "no Ray", "port taken"])
def test_what_is_wrong_is_said(session: Path, installed: Path, case: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if case == "port taken" else free_port()
        if case != "nothing is installed":
            install(installed, seconds=0.0)
        where = installed if case == "no Ray" else session
        process = start(installed, "--session", where, "--prometheus-port", port)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    said = {
        "it ends": "Prometheus has ended (status 0)",
        "nothing is installed": "apt-get install prometheus",
        "no Ray": "start pensieve-serve",
        "port taken": "--prometheus-port",
    }
    assert said[case] in errors
    assert "Traceback" not in errors


def test_what_ray_needs_in_its_environment_is_printed_before_there_is_a_ray(installed: Path) -> None:
    process = start(installed, "--print-env", "--grafana-url", "https://grafana.example.org")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "export RAY_GRAFANA_IFRAME_HOST=https://grafana.example.org\n" in output
    assert "export RAY_GRAFANA_HOST=http://127.0.0.1:3000\n" in output
