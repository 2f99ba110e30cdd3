"""What each error is in HTTP: one table, in which no error that a request may meet is forgotten."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator

import pytest

import deployments
from deployments.errors import AuthenticationError, NoReplicaError, TooManyTokensError
from deployments.generation import ErrorItem
from deployments.http.errors import ERRORS, error_response, wire_of
from engine.errors import ConfigError, EngineError, PensieveError, RequestError


def subclasses(kind: type[PensieveError]) -> Iterator[type[PensieveError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def test_every_error_of_a_request_has_its_own_row() -> None:
    for module in pkgutil.walk_packages(deployments.__path__, "deployments."):
        if ".migrations" not in module.name:
            importlib.import_module(module.name)
    ours = [
        kind
        for base in (RequestError, EngineError)
        for kind in (base, *subclasses(base))
        if kind.__module__.startswith(("engine.", "deployments."))
    ]
    assert set(ERRORS) == set(ours)
    assert len({kind.__name__ for kind in ours}) == len(set(ours))  # an item knows its error by the name


def test_an_error_of_the_start_says_nothing_of_itself_to_clients() -> None:
    assert wire_of(ErrorItem.of(ConfigError("wrong", "model")))[:2] == (500, "server_error")


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (RequestError("no"), 400, {}),
        (AuthenticationError("no"), 401, {"www-authenticate": "Bearer"}),
        (TooManyTokensError("no", retry_after_s=1.2), 429, {"retry-after": "2"}),
        (NoReplicaError("no"), 503, {"retry-after": "5"}),
    ],
)
def test_a_response(error: PensieveError, status: int, headers: dict[str, str]) -> None:
    response = error_response(ErrorItem.of(error))
    assert response.status_code == status
    assert {name: response.headers.get(name) for name in ("www-authenticate", "retry-after")} == {
        "www-authenticate": None,
        "retry-after": None,
    } | headers
    assert set(json.loads(response.body)["error"]) == {"message", "type", "param", "code"}
