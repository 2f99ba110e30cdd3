"""A client that reaches the ports of a running pensieve-serve can run nothing without Ray's token."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.deployments.serve_process import ServeProcess, in_session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STRANGER = Path(__file__).parent / "stranger.py"
SERVER_IP, STRANGER_IP = "10.77.0.1", "10.77.0.2"
WAIT_S = 30.0


@pytest.fixture(scope="module")
def networks() -> Iterator[tuple[str, str]]:
    """Two machines as far as the network goes, and a cable between them: of the server, and of the stranger."""
    if shutil.which("ip") is None or shutil.which("ss") is None:
        pytest.skip("ip and ss are not installed (Debian: apt-get install iproute2)")
    server, stranger = (f"pensieve-{name}-{os.getpid()}" for name in ("server", "stranger"))
    try:
        for name in (server, stranger):
            done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        _run("ip", "link", "add", "cable", "netns", server, "type", "veth", "peer", "name", "cable", "netns", stranger)
        for name, address in ((server, SERVER_IP), (stranger, STRANGER_IP)):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _run("ip", "-n", name, "link", "set", device, "up")
        yield server, stranger
    finally:
        for name in (server, stranger):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def listeners(network: str) -> list[tuple[str, str, str]]:
    """Address, port and program of all that listens there."""
    found = []
    for line in _run("ip", "netns", "exec", network, "ss", "-Hltnp").splitlines():
        host, _, port = line.split()[3].rpartition(":")
        program = re.search(r'\(\("([^"]*)"', line)
        assert program is not None, line
        found.append((host.removeprefix("[::ffff:").strip("[]"), port, program[1]))
    return found


def test_nothing_runs_without_the_token(networks: tuple[str, str], tmp_path: Path) -> None:
    server_network, stranger_network = networks
    server = ServeProcess(tmp_path, ("ip", "netns", "exec", server_network), secrets.token_hex(32))
    try:
        server.wait_until_ready()
        open_ports = listeners(server_network)
        # Serve's gRPC servers, one for each replica, listen everywhere; all else on this machine only.
        exposed = [port for host, port, _ in open_ports if host != "127.0.0.1"]
        assert [program for host, _, program in open_ports if host != "127.0.0.1"] == ["ray::ServeRepli"] * 2, (
            open_ports
        )
        (gcs,) = (port for _, port, program in open_ports if program == "gcs_server")
        token = psutil.Process(server.session).environ()["RAY_AUTH_TOKEN"]
        doors = [
            *(("replica", stranger_network, f"{SERVER_IP}:{port}") for port in exposed),
            # From the same machine, as another user.
            ("gcs", server_network, f"127.0.0.1:{gcs}"),
            ("dashboard", server_network, "127.0.0.1:8265"),
        ]
        keys = {"none": (), "wrong": (token[::-1],), "right": (token,)}

        def knock(door: tuple[str, str, str], key: str) -> tuple[str, str]:
            kind, network, address = door
            folder = tmp_path / f"{kind}-{address}-{key}"
            command = ["ip", "netns", "exec", network, sys.executable, str(STRANGER), kind, address, str(folder)]
            return folder.name, _run(*command, *keys[key])

        with ThreadPoolExecutor(3) as pool:
            outcomes = dict(pool.map(lambda attempt: knock(*attempt), [(door, key) for key in keys for door in doors]))
        # With the token each of them does what it is after: so it is the token that the others lack.
        successful = {f"{kind}-{address}-right" for kind, _, address in doors}
        deadline = time.monotonic() + WAIT_S  # the dashboard's job comes later than its answer
        while not all((tmp_path / name).exists() for name in successful):
            assert time.monotonic() < deadline, outcomes
            time.sleep(0.1)
        assert {path.name for path in tmp_path.iterdir()} & set(outcomes) == successful, outcomes
        # The token is in no log, in no file and in no command line.
        *_, logs = sorted(Path("/tmp/ray").glob(f"session_*_{server.session}"))
        written = [path for path in logs.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
        assert written == []
        assert token not in server.output
        assert list(server.home.rglob("*")) == []
        for process in in_session(server.session):
            with contextlib.suppress(psutil.NoSuchProcess):
                assert token not in " ".join(process.cmdline())
    finally:
        server.stop()
