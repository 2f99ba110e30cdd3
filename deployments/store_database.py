"""The connection to the conversation store's database: URL and drivers, transactions that end in bounded time and fail
with one typed error, the schema brought up to date. Knows SQLite and PostgreSQL apart, so that nobody else has to;
knows nothing of what the tables mean.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from filelock import Timeout as FileLockTimeout
from sqlalchemy import URL, Connection, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from deployments.store_values import StoreConfigError, StoreUnavailableError, StoreVersionError

_T = TypeVar("_T")
Work = Callable[[AsyncConnection], Awaitable[_T]]

_MIGRATIONS = Path(__file__).parent / "migrations"
# What processes that bring one PostgreSQL database up to date agree on; any number that nobody else uses.
_ADVISORY_LOCK = 0x70656E7369657665
_OPEN_TIMEOUT_S = 60.0  # migrations move data, and other processes wait for them


class Database:
    """Opens and closes connections, runs transactions. timeout_s bounds each of: connecting, waiting for a lock, one
    statement; a whole transaction gets twice that."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """Touches no database. Raises StoreConfigError, in which no password is quoted."""
        self._url = _with_async_driver(url)
        self._timeout_s = timeout_s
        self._path = Path(self._url.database or "").resolve() if self._is_sqlite else None
        self._failures: tuple[type[Exception], ...] = (DBAPIError, PoolTimeoutError, OSError, TimeoutError)
        try:
            self._engine = self._create_engine(timeout_s)
            if self._is_sqlite:
                self._failures += (sqlite3.Error,)
            else:
                import asyncpg

                self._failures += (asyncpg.PostgresError, asyncpg.InterfaceError)
        except ModuleNotFoundError as error:
            raise StoreConfigError(
                f"the conversation store needs {error.name}, which is not installed: pip install 'pensieve-ray[postgres]'"
            ) from None
        # Reads see one moment of the database, however many statements they take, and on SQLite wait for no writer.
        options = {} if self._is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._reader = self._engine.execution_options(pensieve_begin="BEGIN", **options)
        # One writer at a time is SQLite's rule; queueing here is fair and prompt, its busy handler sleeps and polls.
        self._write_turn = asyncio.Lock() if self._is_sqlite else None
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def _is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    @property
    def place(self) -> str:
        """Where the database is, without user and password."""
        if self._path is not None:
            return f"SQLite file {self._path}"
        host = self._url.host or self._url.query.get("host", "localhost")
        return f"PostgreSQL database {self._url.database or ''} at {host}:{self._url.port or 5432}"

    async def open(self) -> None:
        """Creates the SQLite file, brings the schema up to date; any number of processes may do so at once. Raises
        StoreUnavailableError, StoreVersionError."""
        if self._path is not None:
            try:
                await asyncio.to_thread(_create_file, self._path)
            except (sqlite3.Error, OSError, FileLockTimeout) as error:
                raise self._unavailable(error) from error
        engine = self._create_engine(_OPEN_TIMEOUT_S)
        try:
            await self._run(engine, self._migrate, self._write_turn, 2 * _OPEN_TIMEOUT_S)
        finally:
            await engine.dispose()

    async def close(self) -> None:
        """Lets running transactions end, within their time."""
        if self._running:
            await asyncio.wait(self._running, timeout=2 * self._timeout_s)
        await asyncio.wait({asyncio.create_task(self._engine.dispose())}, timeout=self._timeout_s)

    async def read(self, work: Work[_T]) -> _T:
        """What `work` returns, in a transaction that cannot write. Raises StoreUnavailableError."""
        return await self._run(self._reader, work, None, 2 * self._timeout_s)

    async def write(self, work: Work[_T]) -> _T:
        """The same, and commits, unless `work` raises. If the caller is cancelled, the transaction still comes to its
        end: breaking off in the middle would cost a connection each time that a client hangs up."""
        return await self._run(self._engine, work, self._write_turn, 2 * self._timeout_s)

    async def _run(self, engine: AsyncEngine, work: Work[_T], turn: asyncio.Lock | None, limit_s: float) -> _T:
        task = asyncio.create_task(self._transact(engine, work, turn))
        self._running.add(task)
        task.add_done_callback(self._forget)
        done, _ = await asyncio.wait({task}, timeout=limit_s)
        if not done:
            # Not awaited: whatever hangs may hang in the clean-up too. The connection is given up.
            task.cancel()
            raise self._unavailable(TimeoutError(f"no answer within {limit_s:g} s"))
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even where the caller is gone

    async def _transact(self, engine: AsyncEngine, work: Work[_T], turn: asyncio.Lock | None) -> _T:
        waiting: AbstractAsyncContextManager[Any] = nullcontext() if turn is None else turn
        try:
            async with waiting, engine.begin() as connection:
                return await work(connection)
        except IntegrityError:
            raise  # a defect of ours, not of the database's health
        except self._failures as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailableError:
        cause = getattr(error, "orig", None) or error
        reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
        remedy = "see that the folder exists, is writable and has room, and that nothing else holds the file"
        if not self._is_sqlite:
            remedy = "start it, or see that it can be reached and takes connections"
        return StoreUnavailableError(
            f"the conversation store does not answer ({self.place}: {reason}); {remedy}. Nothing needs a restart: "
            "requests work again as soon as it is back"
        )

    def _create_engine(self, timeout_s: float) -> AsyncEngine:
        """timeout_s: of a statement. Who cannot be connected to is never waited for longer than everyday work may take."""
        # hide_parameters: errors are logged, and parameters are what users said.
        if self._path is None:
            options = {
                "timeout": self._timeout_s,
                "command_timeout": timeout_s,
                # A process that hangs in the middle of a transaction must not hold its locks for ever.
                "server_settings": {
                    "application_name": "pensieve",
                    "idle_in_transaction_session_timeout": str(int(2000 * timeout_s)),
                },
            }
            return create_async_engine(
                self._url,
                connect_args=options,
                pool_pre_ping=True,
                pool_timeout=timeout_s,
                hide_parameters=True,
            )
        # mode=rw: a file that is gone is an error, not an empty store. The driver begins no transaction by itself.
        url = self._url.set(database=f"file:{quote(str(self._path))}", query={"mode": "rw", "uri": "true"})
        options = {"timeout": timeout_s, "isolation_level": None}
        engine = create_async_engine(url, connect_args=options, pool_timeout=timeout_s, hide_parameters=True)
        _listen(engine, self._path)
        return engine

    async def _migrate(self, connection: AsyncConnection) -> None:
        if not self._is_sqlite:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        await connection.run_sync(self._upgrade)

    def _upgrade(self, connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        script = ScriptDirectory.from_config(config)
        known = {revision.revision for revision in script.walk_revisions()}
        current = MigrationContext.configure(connection).get_current_heads()
        if unknown := set(current) - known:
            raise StoreVersionError(
                f"{self.place} has schema revision {', '.join(sorted(unknown))}, this version knows up to "
                f"{script.get_current_head()}: run the version that wrote it or a later one, or restore a backup"
            )
        if set(current) != set(script.get_heads()):
            command.upgrade(config, "head")


def _with_async_driver(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreConfigError(
            "the conversation store's URL cannot be read; give sqlite:///path/to/file or postgresql://user@host/database"
        ) from None
    if parsed.drivername in ("sqlite", "sqlite+aiosqlite"):
        if parsed.database in (None, "", ":memory:") or parsed.query:
            raise StoreConfigError(
                "the conversation store needs a SQLite file that several processes can open: sqlite:///path/to/file, "
                "without options"
            )
        return parsed.set(drivername="sqlite+aiosqlite")
    if parsed.drivername in ("postgres", "postgresql", "postgresql+asyncpg"):
        query = dict(parsed.query)
        if "sslmode" in query:  # libpq's name for what asyncpg calls ssl
            query["ssl"] = query.pop("sslmode")
        return parsed.set(drivername="postgresql+asyncpg", query=query)
    raise StoreConfigError(
        f"the conversation store cannot be in {parsed.drivername}; give sqlite:///path/to/file or "
        "postgresql://user@host/database"
    )


def _create_file(path: Path) -> None:
    """WAL lets readers go on while one process writes; the file remembers it. Changing to it needs the file for
    itself, without SQLite's patience, so only one process at a time tries."""
    if not path.parent.is_dir():  # FileLock would make it, and a volume that is not mounted would go unnoticed
        raise FileNotFoundError(f"there is no folder {path.parent}")
    with FileLock(f"{path}.lock", timeout=_OPEN_TIMEOUT_S):
        connection = sqlite3.connect(path, timeout=_OPEN_TIMEOUT_S)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()


def _listen(engine: AsyncEngine, path: Path) -> None:
    """What SQLite needs said on every connection and in front of every transaction."""

    @event.listens_for(engine.sync_engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        # FULL: in WAL mode NORMAL may lose the last transactions when the power fails, and a client has been told that
        # its turn is stored. One fsync per transaction is nothing beside generating an answer.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()
        record.info["file"] = _file_identity(path)

    @event.listens_for(engine.sync_engine, "checkout")
    def _checkout(connection: Any, record: Any, proxy: Any) -> None:
        # A file that was deleted or replaced lives on in open connections, and writes to it would be lost.
        if record.info["file"] != _file_identity(path):
            raise DisconnectionError(f"{path} is not the file that it was")

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Connection) -> None:
        # Writers take the lock at once: one that reads first and then finds the lock taken could only fail.
        connection.exec_driver_sql(connection.get_execution_options().get("pensieve_begin", "BEGIN IMMEDIATE"))


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
