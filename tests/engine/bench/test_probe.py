"""What a server takes is found out by asking it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.bench.apis import APIS
from engine.bench.client import Endpoint
from engine.bench.probe import Probed, probe
from engine.errors import ConfigError
from tests.engine.bench.fake_server import FakeServer


def find(url: str, api: str = "chat", **options: Any) -> Probed:
    return asyncio.run(probe(Endpoint("fake", url, api, **options)))


@pytest.mark.parametrize("api", APIS)
def test_a_server_that_takes_everything(server: FakeServer, url: str, api: str) -> None:
    probed = find(url, api)
    assert probed.endpoint.model == "fake"
    assert probed.endpoint.fields["ignore_eos"] is True
    assert len(server.bodies) == 1
    assert probed.notes == (("does not say what it had cached",) if api.startswith("responses") else ())


@pytest.mark.parametrize(
    ("refused", "notes"),
    [
        ({"ignore_eos"}, ["takes no ignore_eos: answers end when the model ends them"]),
        (
            {"ignore_eos", "stream_options"},
            [
                "takes no stream_options: tokens may be counted by the pieces that come",
                "takes no ignore_eos: answers end when the model ends them",
                "does not count the tokens of its answers: their pieces are counted instead",
                "does not say what it had cached",
            ],
        ),
    ],
    ids=["one", "two"],
)
def test_what_is_refused_is_left_out_and_told(
    server: FakeServer, url: str, refused: set[str], notes: list[str]
) -> None:
    server.refused = refused
    probed = find(url)
    assert list(probed.notes) == notes
    assert not refused & probed.endpoint.fields.keys()
    assert probed.endpoint.fields["temperature"] == 0


def test_fields_and_models_that_are_given_are_kept(server: FakeServer, url: str) -> None:
    probed = find(url, model="mine", fields={"temperature": 1.5, "top_k": 3})
    assert (probed.endpoint.model, probed.endpoint.fields["temperature"]) == ("mine", 1.5)
    assert (server.bodies[0]["model"], server.bodies[0]["top_k"]) == ("mine", 3)


def test_a_server_without_token_ids_is_told(server: FakeServer, url: str) -> None:
    server.refused = {"return_token_ids"}
    notes = find(url, "completions").notes
    assert "takes no return_token_ids" in notes
    assert any(note.startswith("does not tell the token ids of its answers: others stand for them") for note in notes)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"models": [], "failing": {1: 404}}, "failed: 404: it is broken; name the model with --model"),
        ({"needs_key": "sk"}, "/models answers 401; give the key with --api-key"),
        ({"failing": {1: 500}}, "fake: a first short request to chat at .* failed: 500: it is broken"),
        ({"refused": {"messages"}}, "a first short request to chat at .* failed: 400: unknown field messages"),
    ],
)
def test_a_server_that_cannot_be_asked(server: FakeServer, url: str, change: dict[str, Any], problem: str) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(ConfigError, match=problem):
        find(url)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no answer from http://127.0.0.1:9/v1 .*; is the server running"):
        find("http://127.0.0.1:9/v1")


@pytest.mark.parametrize("models", [[], [{}]])
def test_a_server_that_lists_no_model_is_asked_for_none(server: FakeServer, url: str, models: list[Any]) -> None:
    server.models = models
    assert find(url).notes[0] == "lists no model: requests name none"
    assert "model" not in server.bodies[0]


def test_keys_are_sent(server: FakeServer, url: str) -> None:
    server.needs_key = "sk"
    assert find(url, api_key="sk").endpoint.model == "fake"
