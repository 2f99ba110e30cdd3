"""The connection to the conversation store's database.

URL and drivers, transactions that end in bounded time and fail with one typed error, the schema brought up to date.
SQLite and PostgreSQL are told apart here and nowhere else. Knows nothing of what the tables mean.
"""

from __future__ import annotations

import asyncio
import logging
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
from filelock import Timeout as FileLockTimeout
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from deployments.store import sqlite
from deployments.store.errors import (
    StoreConfigError,
    StoreCorruptedError,
    StoreError,
    StoreFullError,
    StoreVersionError,
)
from deployments.store.failures import classify
from deployments.store.url import SQLITE, parse_store_url

logger = logging.getLogger("ray.serve")

_T = TypeVar("_T")
Work = Callable[[AsyncConnection], Awaitable[_T]]

_MIGRATIONS = Path(__file__).parent / "migrations"
# The lock of processes that migrate the same PostgreSQL database: an arbitrary number that no other program uses.
_ADVISORY_LOCK = 0x70656E7369657665
_OPEN_TIMEOUT_S = 60.0  # migrations move data, and other processes wait for them


class Database:
    """Opens and closes connections, runs transactions.

    timeout_s: bounds connecting, waiting for a lock, and one statement; a whole transaction gets twice that.
    password: instead of the URL's.
    min_free_bytes: of the disk that a SQLite file is on; what grows is rejected if less is left.
    """

    def __init__(self, url: str, timeout_s: float, password: str | None = None, min_free_bytes: int = 0) -> None:
        """Touches no database. Raises StoreConfigError, in which no password is quoted."""
        self._url = parse_store_url(url)
        if password is not None and not self._is_sqlite:
            self._url = self._url.set(password=password)
        self._timeout_s = timeout_s
        self.min_free_bytes = min_free_bytes
        self._path = Path(self._url.database or "").resolve() if self._is_sqlite else None
        self._last_cause = ""  # of a failure, until something succeeds: said once
        self._failures: tuple[type[Exception], ...] = (
            DBAPIError,
            PoolTimeoutError,
            OSError,
            TimeoutError,
            StoreCorruptedError,
        )
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
        return self._url.drivername == SQLITE

    @property
    def place(self) -> str:
        """Where the database is, without user and password. For the log: it is nothing that clients have to know."""
        if self._path is not None:
            return f"SQLite file {self._path}"
        host = self._url.host or self._url.query.get("host", "localhost")
        return f"PostgreSQL database {self._url.database or ''} at {host}:{self._url.port or 5432}"

    async def open(self) -> None:
        """Makes the SQLite file or looks at it, and brings the schema up to date.

        Any number of processes may do so at once. Raises StoreError, StoreVersionError, and StoreConfigError for
        another program's file.
        """
        if self._path is not None:
            try:
                await asyncio.to_thread(sqlite.prepare_file, self._path, _OPEN_TIMEOUT_S)
            except (sqlite3.Error, OSError, FileLockTimeout, StoreCorruptedError) as error:
                raise self._failure(error) from None
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
        """What `work` returns, in a transaction that cannot write. Raises StoreError."""
        return await self._run(self._reader, work, None, 2 * self._timeout_s)

    async def write(self, work: Work[_T]) -> _T:
        """What `work` returns, in a transaction that is committed unless `work` raises. Raises StoreError.

        If the caller is cancelled, the transaction still comes to its end: breaking off in the middle would cost a
        connection each time that a client hangs up.
        """
        return await self._run(self._engine, work, self._write_turn, 2 * self._timeout_s)

    async def _run(self, engine: AsyncEngine, work: Work[_T], turn: asyncio.Lock | None, limit_s: float) -> _T:
        task = asyncio.create_task(self._transact(engine, work, turn))
        self._running.add(task)
        task.add_done_callback(self._forget)
        done, _ = await asyncio.wait({task}, timeout=limit_s)
        if not done:
            # Not awaited: whatever hangs may hang in the clean-up too. The connection is given up.
            task.cancel()
            raise self._failure(TimeoutError())
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even where the caller is gone

    async def _transact(self, engine: AsyncEngine, work: Work[_T], turn: asyncio.Lock | None) -> _T:
        waiting: AbstractAsyncContextManager[Any] = nullcontext() if turn is None else turn
        try:
            async with waiting, engine.begin() as connection:
                result = await work(connection)
        except IntegrityError:
            raise  # a defect of ours, not of the database's health
        except self._failures as error:
            raise self._failure(error) from None  # what a driver says may quote a row
        self._last_cause = ""
        return result

    async def refuse_if_nearly_full(self, connection: AsyncConnection) -> None:
        """Raises StoreFullError while there is still room for the turns that run, and for what deletes."""
        room = self.bytes_outside()
        if room is None or room >= self.min_free_bytes:
            return
        if room + await sqlite.bytes_inside(connection) < self.min_free_bytes:
            self._say(f"{room / 2**20:.0f} MiB of its disk are left; new turns are stored from {self._min_free_mib} on")
            raise StoreFullError

    def bytes_outside(self) -> int | None:
        """Room on the disk of a SQLite file; None = not known."""
        if self._path is None:
            return None
        try:
            return sqlite.bytes_outside(self._path)
        except OSError:
            return None  # what reads or writes there says so

    @property
    def _min_free_mib(self) -> str:
        return f"{self.min_free_bytes / 2**20:.0f} MiB"

    def _failure(self, error: BaseException) -> StoreError:
        failure = classify(error)
        self._say(failure.cause)
        return failure.error

    def _say(self, cause: str) -> None:
        if cause != self._last_cause:
            logger.error("the conversation store (%s) fails: %s", self.place, cause)
        self._last_cause = cause

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
        sqlite.listen(engine, self._path)
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
                f"the conversation store has schema revision {', '.join(sorted(unknown))}, but this version supports up to "
                f"{script.get_current_head()}: run the version that wrote it or a later one, or restore a backup"
            )
        if set(current) != set(script.get_heads()):
            command.upgrade(config, "head")
