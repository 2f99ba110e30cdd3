"""Where the conversation store is: its URL, as configured, and the password, which a URL never holds.

Opens nothing.

A URL in the configuration is shown by Serve: in its dashboard, in its logs, on its standard output. So a password in
one is refused there; it comes from PENSIEVE_STORE_PASSWORD or a file (`store_password_file`) where the ingress runs,
or, as libpq does it, from PGPASSWORD, PGPASSFILE or ~/.pgpass.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from deployments.store.errors import StoreConfigError

PASSWORD_VARIABLE = "PENSIEVE_STORE_PASSWORD"
SQLITE, POSTGRES = "sqlite+aiosqlite", "postgresql+asyncpg"
_EXAMPLES = "give sqlite:///path/to/file or postgresql://user@host/database"


def parse_store_url(url: str) -> URL:
    """With the driver that is used here. Raises StoreConfigError, in which nothing of the URL is quoted but its kind."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StoreConfigError(f"the conversation store's URL cannot be read; {_EXAMPLES}") from None
    if parsed.drivername in ("sqlite", SQLITE):
        if parsed.database in (None, "", ":memory:") or parsed.query:
            raise StoreConfigError(
                "the conversation store needs a SQLite file that several processes can open: sqlite:///path/to/file, "
                "without options"
            )
        return parsed.set(drivername=SQLITE)
    if parsed.drivername in ("postgres", "postgresql", POSTGRES):
        query = dict(parsed.query)
        if "sslmode" in query:  # libpq's name for what asyncpg calls ssl
            query["ssl"] = query.pop("sslmode")
        return parsed.set(drivername=POSTGRES, query=query)
    raise StoreConfigError(f"the conversation store cannot be in {parsed.drivername}; {_EXAMPLES}")


def check_store_url(url: str) -> None:
    """Of a configuration. Raises StoreConfigError for a URL that cannot be, or that has a password in it."""
    parsed = parse_store_url(url)
    if parsed.password is not None or "password" in parsed.query:
        raise StoreConfigError(
            "the URL has a password in it, which Serve would show in its dashboard and its logs: leave it out, and put it "
            f"into the environment of the ingress's node ({PASSWORD_VARIABLE}, PGPASSWORD) or into a file there "
            "(store_password_file, ~/.pgpass)"
        )


def is_file(url: str | None) -> bool:
    """Whether it is a file of one machine, as it is without any URL, and not a server that several can reach."""
    return url is None or parse_store_url(url).drivername == SQLITE


def read_password(path: str | None, environment: Mapping[str, str]) -> str | None:
    """path: a file with nothing but the password, which wins. None = left to the driver. Raises StoreConfigError."""
    if path is None:
        return environment.get(PASSWORD_VARIABLE)
    try:
        return Path(path).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise StoreConfigError(f"store_password_file {path!r} cannot be read: {reason}") from None
