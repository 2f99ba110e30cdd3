"""Which clients a server without API keys serves."""

from __future__ import annotations

import pytest

from deployments.errors import CrossOriginError, RemoteWithoutKeysError, UnsupportedMediaTypeError
from deployments.http.errors import ERRORS, wire_of
from deployments.http.open_server import FORWARDED, check_is_local, is_loopback
from engine.errors import RequestError

BODY = {"content-type": "application/json", "content-length": "2"}


def check(headers: dict[str, str], client_host: str | None = "127.0.0.1") -> None:
    check_is_local(headers.items(), client_host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "localhost", "LocalHost"])
def test_addresses_of_this_machine(host: str) -> None:
    assert is_loopback(host)
    check({}, host)


@pytest.mark.parametrize(
    "host",
    ["10.0.0.1", "192.168.1.1", "0.0.0.0", "::", "::ffff:10.0.0.1", "2001:db8::1", "127.evil.example", "", "127.1"],
)
def test_addresses_of_others(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(RemoteWithoutKeysError, match="tenants_file"):
        check({}, host)


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]", "[::1]:8000"])
def test_hosts_of_this_machine(host: str) -> None:
    check({"host": host} | BODY)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example@127.0.0.1",
        "127.0.0.1@evil.example",
        "10.0.0.1:8000",
        "[::1",
        "[2001:db8::1]:8000",
        "localhost:many",
        "localhost/",
        "",
        " ",
    ],
)
def test_a_name_that_was_made_to_point_here_is_refused(host: str) -> None:
    """DNS rebinding: the page's own host name resolves to 127.0.0.1."""
    if host == "localhost/":
        check({"host": host})  # no browser sends that; it names no other host
        return
    with pytest.raises(RemoteWithoutKeysError):
        check({"host": host})


def test_every_one_of_several_hosts_counts() -> None:
    with pytest.raises(RemoteWithoutKeysError):
        check_is_local([("host", "localhost"), ("host", "evil.example")], "127.0.0.1")


@pytest.mark.parametrize("name", [*sorted(FORWARDED), "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"])
@pytest.mark.parametrize("value", ["8.8.8.8", "127.0.0.1", "127.0.0.1, 8.8.8.8", ""])
def test_a_proxy_that_says_so_is_told_apart(name: str, value: str) -> None:
    with pytest.raises(RemoteWithoutKeysError, match=name):
        check({name: value})


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1", "https://[::1]:8000", "tauri://localhost"]
)
def test_pages_of_this_machine(origin: str) -> None:
    check({"origin": origin, "sec-fetch-site": "cross-site"} | BODY)  # localhost to 127.0.0.1 is another site
    check({"sec-fetch-site": "none"})
    check({"sec-fetch-site": "same-origin"})


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "https://localhost.evil.example"},
        {"origin": "http://127.0.0.1@evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://[::1"},
        {"sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
def test_pages_from_elsewhere(headers: dict[str, str]) -> None:
    with pytest.raises(CrossOriginError):
        check(headers | BODY)


@pytest.mark.parametrize(
    "media_type", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"]
)
def test_json(media_type: str) -> None:
    check({"content-length": "2", "content-type": media_type})


@pytest.mark.parametrize(
    "media_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=application/json",
        "json",
        "",
        None,
    ],
)
@pytest.mark.parametrize("length", [{"content-length": "2"}, {"transfer-encoding": "chunked"}], ids=str)
def test_what_a_form_can_send_is_refused(media_type: str | None, length: dict[str, str]) -> None:
    with pytest.raises(UnsupportedMediaTypeError, match="application/json") as caught:
        check(length if media_type is None else length | {"content-type": media_type})
    assert wire_of(caught.value).status == 415


def test_without_a_body_there_is_nothing_to_say_of_it() -> None:
    check({})
    check({"content-length": "0"})


def test_where_clients_cannot_be_told_apart_keys_are_needed() -> None:
    with pytest.raises(RemoteWithoutKeysError, match="HAProxy"):
        check_is_local((), "127.0.0.1", sees_clients=False)


def test_every_refusal_is_the_clients_and_says_how_to_go_on() -> None:
    for kind in (RemoteWithoutKeysError, CrossOriginError, UnsupportedMediaTypeError):
        assert issubclass(kind, RequestError)
        assert ERRORS[kind].code
