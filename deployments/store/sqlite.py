"""The file of a conversation store in SQLite, which only its owner can read.

Checked before it is used; and what SQLite needs said on every connection. Knows nothing of what the tables mean.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import Connection, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from deployments.store.errors import StoreConfigError, StoreCorruptedError

logger = logging.getLogger("ray.serve")

# "Pens", in the header of each file of ours, so that another program's is not taken for one.
APPLICATION_ID = 0x50656E73
# How long a file may be looked at for damage when it is opened, in seconds; about a gigabyte, from a fast disk.
QUICK_CHECK_S = 5.0
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def prepare_file(path: Path, timeout_s: float) -> None:
    """Makes the file if there is none; else checks that it is a store, undamaged, and private.

    It is searched for damage for at most QUICK_CHECK_S. Blocking. Raises StoreCorruptedError, StoreConfigError,
    sqlite3.Error, OSError.
    """
    if not path.parent.is_dir():  # FileLock would make it, and a volume that is not mounted would go unnoticed
        raise FileNotFoundError(2, "no such folder")
    # Only one process at a time makes the file, or changes it to WAL, which needs it for itself, without SQLite's patience.
    with FileLock(f"{path}.lock", timeout=timeout_s, mode=0o600):
        if not path.exists():
            _make(path)
        for each in (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", ".lock"))):
            _close_to_others(each)
        if path.stat().st_size == 0:  # ours is never empty, not even while it is being made
            logger.error("%s is empty. To begin a new store, remove it", path)
            raise StoreCorruptedError
        with contextlib.closing(sqlite3.connect(path, timeout=timeout_s)) as connection:
            _identify(connection, path)
            # WAL lets readers go on while one process writes; the file remembers it.
            connection.execute("PRAGMA journal_mode=WAL")
    with contextlib.closing(sqlite3.connect(path, timeout=timeout_s)) as connection:
        _look_for_damage(connection, path)


def _make(path: Path) -> None:
    """Whole or not at all: it gets its name once it says what it is."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with contextlib.closing(sqlite3.connect(new)) as connection:
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute("PRAGMA journal_mode=WAL")
    os.replace(new, path)
    logger.info("a new conversation store: %s", path)


def _close_to_others(path: Path) -> None:
    """SQLite gives the -wal and -shm files that it makes the mode of the database."""
    with contextlib.suppress(FileNotFoundError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & _OTHERS:
            try:
                path.chmod(0o600)
            except PermissionError:  # of another user, who has to know
                logger.warning("%s can be read by other users (mode %o), and its owner alone can end that", path, mode)
                return
            logger.warning("%s could be read by other users (mode %o); it no longer can (600)", path, mode)


def _identify(connection: sqlite3.Connection, path: Path) -> None:
    """Marks files of older versions, which are known by their tables."""
    (found,) = connection.execute("PRAGMA application_id").fetchone()
    if found == APPLICATION_ID:
        return
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if found != 0 or (tables and "alembic_version" not in tables):
        logger.error("%s is the database of another program", path)
        raise StoreConfigError(
            "the file of the conversation store is another program's database: give another store_url"
        )
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")


def _look_for_damage(connection: sqlite3.Connection, path: Path) -> None:
    deadline = time.monotonic() + QUICK_CHECK_S
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname != "SQLITE_INTERRUPT":
            raise
        logger.info("%s is large: it was looked at for damage for %g s, not to its end", path, QUICK_CHECK_S)
        return
    if verdict != "ok":
        logger.error("%s is damaged (PRAGMA quick_check)", path)
        raise StoreCorruptedError


def listen(engine: AsyncEngine, path: Path) -> None:
    """What SQLite needs said on every connection and in front of every transaction."""

    @event.listens_for(engine.sync_engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        # FULL: in WAL mode NORMAL may lose the last transactions when the power fails, and a client has been told that
        # its turn is stored. One fsync per transaction is nothing beside generating an answer.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()
        record.info["file"] = _identity(path)

    @event.listens_for(engine.sync_engine, "checkout")
    def _checkout(connection: Any, record: Any, proxy: Any) -> None:
        # A file that was deleted or replaced lives on in open connections, and writes to it would be lost.
        if record.info["file"] != _identity(path):
            raise DisconnectionError("the database file was replaced")

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Connection) -> None:
        # Writers take the lock at once: one that reads first and then finds the lock taken could only fail.
        connection.exec_driver_sql(connection.get_execution_options().get("pensieve_begin", "BEGIN IMMEDIATE"))


async def bytes_inside(connection: AsyncConnection) -> int:
    """Room in the file itself, that deleted rows left: it does not shrink."""
    page_size = (await connection.exec_driver_sql("PRAGMA page_size")).scalar_one()
    num_free = (await connection.exec_driver_sql("PRAGMA freelist_count")).scalar_one()
    return int(page_size) * int(num_free)


def bytes_outside(path: Path) -> int:
    """Room on its disk for this user. Raises OSError."""
    status = os.statvfs(path.parent)
    return status.f_bavail * status.f_frsize


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
