"""Fixtures of the deployments' tests: an application over a scripted engine, a Serve, and databases.

The application runs in this process and without Ray.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deployments import metrics
from deployments.generation import DeltaItem, GenerationItem, GenerationRequest, ModelCard
from deployments.ingress import IngressConfig, create_app
from engine.errors import EngineStoppedError
from engine.text.output import OutputDelta, merge_deltas
from tests.deployments.local_ray import LocalServe

MAX_BODY_BYTES = 4096
USER_WITH_PASSWORD = "careful"  # of the PostgreSQL server; the other users need none


class NoMetric:
    """Takes what a metric takes, and forgets it."""

    def inc(self, value: float, tags: dict[str, str]) -> None: ...

    def set(self, value: float, tags: dict[str, str]) -> None: ...

    def observe(self, value: float) -> None: ...


@pytest.fixture(scope="session", autouse=True)
def no_metrics_of_the_tests_own_process() -> Iterator[None]:
    """Keeps metrics of this process out of the clusters that it starts.

    Ray keeps a process's metrics and exports them from whichever cluster the process starts next: an engine replica
    made here would be seen among those of a real application.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "make_metric", lambda definition: NoMetric())
        yield


class ScriptedEngine:
    """Says `items`, whatever it is asked, and notes what it was asked; as one if it is not to stream.

    hangs: never comes to an end.
    """

    def __init__(self) -> None:
        self.items: list[GenerationItem] = [
            DeltaItem(OutputDelta("Hel", (1,), (), (7, 8), 5, 3, 1), 2),
            DeltaItem(OutputDelta("", (2,), (), (), 5, 3, 2), 2),
            DeltaItem(OutputDelta("lo", (3, 4), (), (), 5, 3, 4, "stop"), 2),
        ]
        self.requests: list[GenerationRequest] = []
        self.hangs = False
        self.is_up = True
        self.num_describes = 0
        self.num_running = 0
        self.num_aborted = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        self.requests.append(request)
        self.num_running += 1
        try:
            for item in self.items if request.stream else merged(self.items):
                await asyncio.sleep(0)
                yield item
            if self.hangs:
                await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.num_aborted += 1
            raise
        finally:
            self.num_running -= 1

    async def describe(self) -> ModelCard:
        self.num_describes += 1
        if not self.is_up:
            raise EngineStoppedError("no engine replica is ready")
        return ModelCard("tiny", 100, 128)

    async def model_card(self) -> ModelCard:
        return await self.describe()

    async def load(self) -> int:
        await self.describe()
        return self.num_running

    def choose_session_id(self, candidates: Sequence[str]) -> str:
        return candidates[-1]


def merged(items: Sequence[GenerationItem]) -> list[GenerationItem]:
    """An answer that does not stream: one delta, or what went wrong."""
    deltas = [item for item in items if isinstance(item, DeltaItem)]
    if not deltas or len(deltas) < len(items):
        return [item for item in items if not isinstance(item, DeltaItem)]
    return [replace(deltas[-1], delta=merge_deltas([item.delta for item in deltas]))]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def app(engine: ScriptedEngine, tmp_path: Path) -> FastAPI:
    config = IngressConfig(max_body_bytes=MAX_BODY_BYTES, store_url=f"sqlite:///{tmp_path / 'conversations.db'}")
    return create_app(engine, config, ingress_id="ingress-1")


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="session")
def local_serve() -> Iterator[LocalServe]:
    """The Serve of this process; modules that need a Ray of their own stop it first."""
    shared = LocalServe()
    yield shared
    shared.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a Serve run one after the other, at the end: each of the others would make it start again."""
    items.sort(key=lambda item: getattr(item, "module", None) is not None and hasattr(item.module, "SHARED_SERVE"))


class PostgresServer:
    """Debian's PostgreSQL in a temporary folder, on a Unix socket there, as a user that is not root."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="pensieve-pg-", dir="/tmp"))  # a socket's path has to be short
        self.process: subprocess.Popen[bytes] | None = None
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:  # which initdb and postgres refuse
            account = pwd.getpwnam("postgres")
            self.user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        options = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._run("initdb", *options, "--pgdata", str(self.folder / "data"))
        rules = self.folder / "data" / "pg_hba.conf"
        rules.write_text(f"local all {USER_WITH_PASSWORD} scram-sha-256\n" + rules.read_text())

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.binaries / program), *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, timeout=60, check=False, **self.user)
        assert done.returncode == 0, f"{program}: {done.stderr.decode()}"

    def start(self) -> None:
        settings = ["listen_addresses=", f"unix_socket_directories={self.folder}", "fsync=off", "max_connections=60"]
        command = [str(self.binaries / "postgres"), "-D", str(self.folder / "data")]
        for setting in settings:
            command += ["-c", setting]
        with open(self.folder / "server.txt", "ab") as output:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=output, **self.user)
        is_ready = [str(self.binaries / "pg_isready"), "--quiet", "--host", str(self.folder)]
        while subprocess.run(is_ready, check=False).returncode != 0:
            assert self.process.poll() is None, (self.folder / "server.txt").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # without waiting for clients
            self.process.wait(timeout=30)
            self.process = None

    def empty_database(self, *statements: str) -> str:
        """URL of the one database, with nothing in it but what the statements put there.

        A new one each time would be 8 MB each time.
        """
        statements = ("DROP SCHEMA public CASCADE", "CREATE SCHEMA public", *statements)
        commands = [argument for statement in statements for argument in ("--command", statement)]
        self._run("psql", "--host", str(self.folder), "--username=postgres", "--quiet", *commands)
        return f"postgresql://postgres@/postgres?host={self.folder}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Running before and after each test that uses it; skips where no PostgreSQL server is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    on_path = shutil.which("postgres")
    if not found and on_path is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    if os.geteuid() == 0 and not any(account.pw_name == "postgres" for account in pwd.getpwall()):
        pytest.skip("PostgreSQL refuses root, and there is no user 'postgres' to run it as")
    server = PostgresServer(found[-1].parent if found else Path(str(on_path)).resolve().parent)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.empty_database()
