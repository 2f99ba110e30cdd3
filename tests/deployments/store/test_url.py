"""Where the store is, and how it comes by its password: never through the configuration, never into a log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from deployments.store.conversation_store import ConversationStore
from deployments.store.errors import StoreConfigError, StoreUnavailableError
from deployments.store.url import check_store_url, is_file, parse_store_url, read_password
from tests.deployments.conftest import USER_WITH_PASSWORD
from tests.deployments.store.stored_turns import NOW, turn

PASSWORD = "se/cr@et %"  # without a colon, which asyncpg does not understand in a .pgpass


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:se_cret@host/database",
        "postgresql://user:@host/database",
        "postgresql+asyncpg://user:se_cret@host/database",
        "postgres://user@host/database?password=se_cret",
    ],
)
def test_a_password_in_the_configuration_is_refused(url: str) -> None:
    with pytest.raises(StoreConfigError, match="PENSIEVE_STORE_PASSWORD") as caught:
        check_store_url(url)
    assert "se_cret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "expected"),
    [(None, True), ("sqlite:////var/x.db", True), ("postgresql://user@host/database", False)],
)
def test_what_is_a_file(url: str | None, expected: bool) -> None:
    if url is not None:
        check_store_url(url)
    assert is_file(url) is expected


def test_sslmode_is_the_drivers_ssl() -> None:
    assert parse_store_url("postgresql://user@host/database?sslmode=require").query == {"ssl": "require"}


def test_where_a_password_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(f"{PASSWORD}\n")
    environment = {"PENSIEVE_STORE_PASSWORD": "other"}
    assert read_password(None, {}) is None
    assert read_password(None, environment) == "other"
    assert read_password(str(path), environment) == PASSWORD
    path.write_bytes(b"\xff")
    for odd in (path, tmp_path / "none", tmp_path):
        with pytest.raises(StoreConfigError, match="store_password_file"):
            read_password(str(odd), environment)


async def test_postgres_asks_for_the_password(
    postgres: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres.empty_database(
        f"DROP ROLE IF EXISTS {USER_WITH_PASSWORD}",
        f"CREATE ROLE {USER_WITH_PASSWORD} LOGIN PASSWORD '{PASSWORD}'",
        f"GRANT ALL ON SCHEMA public TO {USER_WITH_PASSWORD}",
    ).replace("postgres@", f"{USER_WITH_PASSWORD}@")
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"*:*:*:*:{PASSWORD}\n")
    passfile.chmod(0o600)
    for password, variables, is_served in (
        ("wrong", {}, False),
        (PASSWORD, {}, True),
        (None, {"PGPASSWORD": PASSWORD}, True),
        (None, {"PGPASSFILE": str(passfile)}, True),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setitem(os.environ, name, value)
            store = ConversationStore(url, password=password)
            if is_served:
                await store.open(NOW)
                await turn(store, store.new_id("resp"))
            else:
                with pytest.raises(StoreUnavailableError):
                    await store.open(NOW)
            await store.close()
    assert "SQLSTATE 28P01 (InvalidPasswordError): the password is wrong or missing" in caplog.text
    assert PASSWORD not in caplog.text
