"""API keys and what they stand for; and that no key is ever said."""

from __future__ import annotations

import asyncio
import hmac
import os
from pathlib import Path

import pytest
import yaml

from deployments import tenants
from deployments.errors import AuthenticationError
from deployments.tenants import Authenticator, TenantConfig, WatchedTenants, environment_tenants, hash_key, load_tenants
from engine.errors import ConfigError
from engine.tenant import Tenant

KEY_A, KEY_B, KEY_B2 = "sk-a", "sk-b", "sk-b-2"


@pytest.fixture
def tenants_file(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "tenants": [
                    {"id": "a", "api_keys_sha256": [hash_key(KEY_A)], "weight": 2, "tokens_per_minute": 100},
                    {"id": "b", "api_keys_sha256": [hash_key(KEY_B), hash_key(KEY_B2)]},
                ]
            }
        )
    )
    return path


def test_each_key_is_its_tenant(tenants_file: Path) -> None:
    authenticator = Authenticator(load_tenants(str(tenants_file), {"PENSIEVE_API_KEY": "from the environment"}))
    expected = {
        KEY_A: Tenant("a", 2.0),
        KEY_B: Tenant("b"),
        KEY_B2: Tenant("b"),
        "from the environment": Tenant("default"),
    }
    for key, tenant in expected.items():
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert authenticator.authenticate(f"{scheme} {key}") == tenant


def test_an_operator_is_one_as_long_as_its_entry_says_so(tenants_file: Path) -> None:
    tenants = load_tenants(str(tenants_file), {})
    authenticator = Authenticator([tenants[0].model_copy(update={"operator": True}), tenants[1]])
    assert authenticator.is_operator(Tenant("a"))
    assert not authenticator.is_operator(Tenant("b"))
    authenticator.use(tenants)
    assert not authenticator.is_operator(Tenant("a"))


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {KEY_A}", KEY_A, f"Bearer {KEY_A}x", "Bearer \xe9"],
)
def test_no_other_key_is_accepted(tenants_file: Path, header: str | None) -> None:
    authenticator = Authenticator(load_tenants(str(tenants_file), {}))
    with pytest.raises(AuthenticationError) as caught:
        authenticator.authenticate(header)
    assert KEY_A not in caught.value.message


def test_the_time_of_a_comparison_tells_nothing(tenants_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared with every hash, whole, by a function made for it, whether one fits or not."""
    compared: list[tuple[str, str]] = []
    original = hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return original(a, b)

    monkeypatch.setattr(tenants.hmac, "compare_digest", compare)
    authenticator = Authenticator(load_tenants(str(tenants_file), {}))
    for key in (KEY_A, KEY_B2):
        authenticator.authenticate(f"Bearer {key}")
    with pytest.raises(AuthenticationError):
        authenticator.authenticate("Bearer wrong")
    assert len(compared) == 9
    assert {len(text) for pair in compared for text in pair} == {64}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tenants: []", "tenants"),
        ("tenants: [{id: a}]", "api_keys_sha256"),
        ("tenants: [{id: a, api_keys_sha256: [sk-secret]}]", "api_keys_sha256"),
        ("tenants: [{id: 'a b', api_keys_sha256: ['" + "0" * 64 + "']}]", "id"),
        ("tenants: [{id: a, api_keys_sha256: ['" + "0" * 64 + "'], weight: 0}]", "weight"),
        ("tenants: [{id: a, api_keys_sha256: ['" + "0" * 64 + "'], colour: red}]", "colour"),
        (
            "tenants: [{id: a, api_keys_sha256: ['" + "0" * 64 + "']}, {id: b, api_keys_sha256: ['" + "0" * 64 + "']}]",
            "API key is given twice",
        ),
        (
            "tenants: [{id: a, api_keys_sha256: ['" + "0" * 64 + "']}, {id: a, api_keys_sha256: ['" + "1" * 64 + "']}]",
            "tenant id is given twice",
        ),
        (f"tenants: [{{id: a, api_keys_sha256: [{hash_key('')}]}}]", "the hash of an empty key"),
        ("tenants: [", "cannot be read"),
        ("[]", "valid dictionary"),
    ],
)
def test_a_bad_file_is_an_error_that_says_no_key(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tenants(str(path), {})
    assert "sk-secret" not in caught.value.message


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tenants("/nowhere/tenants.yaml", {})


def test_a_default_tenant_twice(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text("tenants: [{id: default, api_keys_sha256: ['" + "0" * 64 + "']}]")
    with pytest.raises(ConfigError, match="rename that or unset"):
        load_tenants(str(path), {"PENSIEVE_API_KEY": "x"})


def test_a_new_key_fits_the_lines_that_are_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tenants.main(["new", "acme"]) == 0
    printed = capsys.readouterr()
    key = printed.err.split()[-1]
    path = tmp_path / "tenants.yaml"
    path.write_text("tenants:\n" + printed.out)
    assert key not in printed.out
    authenticator = Authenticator(load_tenants(str(path), {}))
    assert authenticator.authenticate(f"Bearer {key}") == Tenant("acme")
    assert tenants.main(["old"]) == 2


# -- a file that changes -----------------------------------------------------------------------------------------------


def keys_of(tenants: tuple[TenantConfig, ...] | None) -> set[str] | None:
    return None if tenants is None else {key for tenant in tenants for key in tenant.api_keys_sha256}


def write(path: Path, *keys: str) -> None:
    hashes = ", ".join(hash_key(key) for key in keys)
    path.write_text(f"tenants: [{{id: a, api_keys_sha256: [{hashes}]}}]")


def test_a_changed_file_is_read_once_and_the_environments_tenant_stays(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    write(path, "old")
    watched = WatchedTenants(str(path), environment_tenants({"PENSIEVE_API_KEY": "env"}))
    assert keys_of(watched.read_if_changed()) == {hash_key("old"), hash_key("env")}
    assert watched.read_if_changed() is None
    write(path, "new", "newer")
    assert keys_of(watched.read_if_changed()) == {hash_key("new"), hash_key("newer"), hash_key("env")}
    # As editors and Kubernetes do it: another file in its place, of the same size, and perhaps as old.
    state = path.stat()
    write(tmp_path / "next.yaml", "old", "newer")
    os.utime(tmp_path / "next.yaml", ns=(state.st_atime_ns, state.st_mtime_ns))
    (tmp_path / "next.yaml").replace(path)
    assert keys_of(watched.read_if_changed()) == {hash_key("old"), hash_key("newer"), hash_key("env")}
    assert watched.read_if_changed() is None


@pytest.mark.parametrize(
    "content", ["tenants: [", "tenants: []", "[]", "tenants: [{id: a, api_keys_sha256: [sk-secret]}]", None]
)
def test_a_broken_file_changes_nothing_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    said: list[str] = []
    monkeypatch.setattr(tenants.logger, "error", lambda text, *values: said.append(text % values))
    path = tmp_path / "tenants.yaml"
    write(path, "old")
    watched = WatchedTenants(str(path), ())
    assert watched.read_if_changed() is not None
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert [watched.read_if_changed() for _ in range(3)] == [None] * 3
    (line,) = said
    assert "still are" in line
    assert "sk-secret" not in line
    write(path, "new")
    assert keys_of(watched.read_if_changed()) == {hash_key("new")}


async def test_whoever_watches_hears_of_changes_and_of_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "WATCH_PERIOD_S", 0.01)
    path = tmp_path / "tenants.yaml"
    write(path, "old")
    heard: asyncio.Queue[tuple[TenantConfig, ...]] = asyncio.Queue()
    watching = asyncio.create_task(WatchedTenants(str(path), ()).watch(heard.put_nowait))
    async with asyncio.timeout(10):
        assert keys_of(await heard.get()) == {hash_key("old")}
        await asyncio.sleep(0.05)
        write(path, "new", "newer")
        while keys_of(await heard.get()) != {hash_key("new"), hash_key("newer")}:
            pass
    watching.cancel()
    assert heard.empty()


def test_a_revoked_key_is_refused_from_then_on() -> None:
    old, new = (TenantConfig(id="a", api_keys_sha256=(hash_key(key),)) for key in ("old", "new"))
    authenticator = Authenticator((old,))
    assert authenticator.authenticate("Bearer old") == Tenant("a")
    authenticator.use((new,))
    with pytest.raises(AuthenticationError):
        authenticator.authenticate("Bearer old")
    assert authenticator.authenticate("Bearer new") == Tenant("a")
