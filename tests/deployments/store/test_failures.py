"""What the store makes of its drivers' errors: three kinds, and a cause that quotes nothing."""

from __future__ import annotations

import errno
import sqlite3

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from deployments.store.errors import StoreCorruptedError, StoreError, StoreFullError, StoreUnavailableError
from deployments.store.failures import classify

SECRET = "a client's words"


def sqlite_error(name: str) -> sqlite3.Error:
    error = sqlite3.OperationalError(SECRET)
    error.sqlite_errorname = name
    return error


@pytest.mark.parametrize(
    ("error", "expected", "cause"),
    [
        (sqlite_error("SQLITE_FULL"), StoreFullError, "SQLITE_FULL"),
        (sqlite_error("SQLITE_CORRUPT_INDEX"), StoreCorruptedError, "SQLITE_CORRUPT_INDEX"),
        (sqlite_error("SQLITE_NOTADB"), StoreCorruptedError, "SQLITE_NOTADB"),
        (sqlite_error("SQLITE_IOERR_WRITE"), StoreUnavailableError, "SQLITE_IOERR_WRITE"),
        (sqlite_error("SQLITE_BUSY"), StoreUnavailableError, "SQLITE_BUSY: another process"),
        (sqlite3.OperationalError(f"Could not decode to UTF-8: {SECRET}"), StoreCorruptedError, "not UTF-8"),
        (OSError(errno.ENOSPC, SECRET), StoreFullError, "ENOSPC"),
        (OSError(errno.ENOENT, SECRET), StoreUnavailableError, "ENOENT: its folder does not exist"),
        (ConnectionRefusedError(errno.ECONNREFUSED, SECRET), StoreUnavailableError, "ConnectionRefusedError: nothing"),
        (asyncpg.DiskFullError(SECRET), StoreFullError, "SQLSTATE 53100"),
        (asyncpg.DataCorruptedError(SECRET), StoreCorruptedError, "SQLSTATE XX001"),
        (asyncpg.IndexCorruptedError(SECRET), StoreCorruptedError, "SQLSTATE XX002"),
        (asyncpg.CannotConnectNowError(SECRET), StoreUnavailableError, "SQLSTATE 57P03"),
        (TimeoutError(SECRET), StoreUnavailableError, "TimeoutError: no answer in time"),
        (StoreCorruptedError(), StoreCorruptedError, "a row cannot be read"),
    ],
)
def test_kinds_of_failures(error: Exception, expected: type[StoreError], cause: str) -> None:
    for each in (error, DBAPIError(SECRET, None, error)) if not isinstance(error, StoreError) else (error,):
        failure = classify(each)
        assert type(failure.error) is expected
        assert failure.cause.startswith(cause)
        assert SECRET not in failure.cause + failure.error.message
    assert (failure.error.retry_after_s is None) == (expected is StoreCorruptedError)
