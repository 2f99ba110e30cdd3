"""API keys and what they stand for; and that no key is ever said."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest
import yaml

from deployments import tenants
from deployments.tenants import AuthenticationError, Authenticator, RemoteWithoutKeysError, hash_key, load_tenants
from engine.errors import ConfigError
from engine.tenant import LOCAL_TENANT, Tenant

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
            assert authenticator.authenticate(f"{scheme} {key}", "10.0.0.1") == tenant


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {KEY_A}", KEY_A, f"Bearer {KEY_A}x", "Bearer \xe9"],
)
def test_no_other_key_is_accepted(tenants_file: Path, header: str | None) -> None:
    authenticator = Authenticator(load_tenants(str(tenants_file), {}))
    with pytest.raises(AuthenticationError) as caught:
        authenticator.authenticate(header, "127.0.0.1")
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
        authenticator.authenticate(f"Bearer {key}", None)
    with pytest.raises(AuthenticationError):
        authenticator.authenticate("Bearer wrong", None)
    assert len(compared) == 9
    assert {len(text) for pair in compared for text in pair} == {64}


def test_without_keys_only_this_machine_is_served() -> None:
    authenticator = Authenticator(load_tenants(None, {}))
    for host in ("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", None):
        assert authenticator.authenticate("Bearer whatever", host) == LOCAL_TENANT
    for host in ("10.0.0.1", "192.168.1.1", "::ffff:10.0.0.1", "2001:db8::1"):
        with pytest.raises(RemoteWithoutKeysError, match="tenants_file"):
            authenticator.authenticate(None, host)


def test_where_clients_cannot_be_told_apart_keys_are_needed(tenants_file: Path) -> None:
    with pytest.raises(RemoteWithoutKeysError, match="HAProxy"):
        Authenticator((), sees_clients=False).authenticate(None, "127.0.0.1")
    authenticator = Authenticator(load_tenants(str(tenants_file), {}), sees_clients=False)
    assert authenticator.authenticate(f"Bearer {KEY_A}", "127.0.0.1") == Tenant("a", 2.0)


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
            "API key twice",
        ),
        (
            "tenants: [{id: a, api_keys_sha256: ['" + "0" * 64 + "']}, {id: a, api_keys_sha256: ['" + "1" * 64 + "']}]",
            "tenant id twice",
        ),
        (f"tenants: [{{id: a, api_keys_sha256: [{hash_key('')}]}}]", "the hash of nothing"),
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
    with pytest.raises(ConfigError, match="rename or unset"):
        load_tenants(str(path), {"PENSIEVE_API_KEY": "x"})


def test_a_new_key_fits_the_lines_that_are_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tenants.main(["new", "acme"]) == 0
    printed = capsys.readouterr()
    key = printed.err.split()[-1]
    path = tmp_path / "tenants.yaml"
    path.write_text("tenants:\n" + printed.out)
    assert key not in printed.out
    authenticator = Authenticator(load_tenants(str(path), {}))
    assert authenticator.authenticate(f"Bearer {key}", None) == Tenant("acme")
    assert tenants.main(["old"]) == 2
