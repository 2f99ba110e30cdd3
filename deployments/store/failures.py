"""What a failure of the database means: one of the store's errors, and a short cause for the log.

Never a driver's own words, which may quote a row, a path or a host.
"""

from __future__ import annotations

import errno
import sqlite3
from dataclasses import dataclass

from deployments.store.errors import StoreCorruptedError, StoreError, StoreFullError, StoreUnavailableError

_REMEDIES = {
    "SQLITE_BUSY": "another process has held the file for too long",
    "SQLITE_CANTOPEN": "see that the file and its folder exist and can be read and written by this user",
    "SQLITE_READONLY": "the file cannot be written by this user",
    "SQLITE_PERM": "the file cannot be written by this user",
    "ENOENT": "its folder does not exist; a volume may not be mounted",
    "EACCES": "the file or its folder cannot be written by this user",
    "TimeoutError": "no answer in time",
    "ConnectionRefusedError": "nothing listens there",
    "SQLSTATE 28P01": "the password is wrong or missing",
    "SQLSTATE 28000": "the server refuses this user",
    "SQLSTATE 3D000": "there is no such database",
    "SQLSTATE 53300": "the server has no connections left",
    "SQLSTATE 57P03": "the server is starting or stopping",
}
_FULL = ("SQLITE_FULL", "ENOSPC", "EDQUOT", "SQLSTATE 53100")
_CORRUPTED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLSTATE XX001", "SQLSTATE XX002", "not UTF-8")


@dataclass(frozen=True, slots=True)
class Failure:
    error: StoreError
    cause: str


def classify(error: BaseException) -> Failure:
    if isinstance(error, StoreError):
        return Failure(error, "a row cannot be read")
    name = _name(getattr(error, "orig", None) or error)
    kind: type[StoreError] = StoreUnavailableError
    if name.startswith(_FULL):
        kind = StoreFullError
    elif name.startswith(_CORRUPTED):
        kind = StoreCorruptedError
    remedy = next((words for start, words in _REMEDIES.items() if name.startswith(start)), "")
    return Failure(kind(), f"{name}: {remedy}" if remedy else name)


def _name(error: BaseException) -> str:
    """A code if there is one: SQLite's, SQL's, the system's; else the name of the exception."""
    if isinstance(error, sqlite3.Error):
        if code := getattr(error, "sqlite_errorname", None):
            return str(code)
        if str(error).startswith("Could not decode to UTF-8"):  # Python's own, without a code
            return "not UTF-8"
    if state := getattr(error, "sqlstate", None):
        return f"SQLSTATE {state} ({type(error.__cause__ or error).__name__})"
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return type(error).__name__
