"""Sessions in time against a fake server: order, pauses, what fails, and what was measured."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace

import pytest

from engine.bench import client
from engine.bench.apis import APIS, Content
from engine.bench.client import Client, Endpoint
from engine.bench.driver import Driver, Load
from engine.bench.turns import LoopLag, TurnRecord
from engine.workloads.session import Session
from tests.engine.bench.fake_server import FakeServer


def drive(url: str, sessions: list[Session], api: str = "chat", **options: object) -> tuple[list[TurnRecord], LoopLag]:
    fields = (
        {} if api.startswith("responses") else {"stream_options": {"include_usage": True}, "return_token_ids": True}
    )
    endpoint = Endpoint("fake", url, api, "fake", fields=fields)
    records: list[TurnRecord] = []

    async def run() -> LoopLag:
        http = Client(endpoint)
        try:
            load = Load("run", Content(), **options)  # type: ignore[arg-type]
            driver = Driver(http, load, time.perf_counter(), records.append)
            return await driver.run(sessions, itertools.count().__next__)
        finally:
            await http.close()

    return records, asyncio.run(run())


@pytest.mark.parametrize("api", APIS)
def test_a_session_keeps_its_order_and_its_pauses(
    server: FakeServer, url: str, sessions: list[Session], api: str
) -> None:
    records, lag = drive(url, sessions[:1], api)
    assert [(record.turn, record.kind, record.error) for record in records] == [
        (0, "user", ""),
        (1, "user", ""),
        (2, "look", ""),
    ]
    for before, record, turn in zip(records, records[1:], sessions[0].turns[1:], strict=False):
        assert record.due_s == pytest.approx(before.end_s + turn.pause_s)
        assert record.due_s <= record.sent_s < record.first_s <= record.end_s  # type: ignore[operator]
    assert [record.num_output_tokens for record in records] == [3, 3, 3]
    assert all(record.is_counted for record in records)
    assert set(server.session_ids) == {"run.s0"}
    assert 0 <= lag.p99_s <= lag.max_s


def test_a_connection_that_was_idle_as_long_as_a_server_may_close_it_is_not_used_again(
    server: FakeServer, url: str, sessions: list[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that closes one just as a turn is sent would look as if it had failed."""
    assert client.MAX_IDLE_S < 5.0  # uvicorn's, llama.cpp's and Node's
    drive(url, sessions[:1])
    assert len(set(server.ports)) == 1
    monkeypatch.setattr(client, "MAX_IDLE_S", 0.0)
    server.ports.clear()
    drive(url, sessions[:1])
    assert len(set(server.ports)) == len(sessions[0].turns)


def test_the_answer_is_in_the_next_prompt(server: FakeServer, url: str, sessions: list[Session]) -> None:
    drive(url, sessions[:1])
    contents = [[message["content"] for message in body["messages"]] for body in server.bodies]
    assert [len(each) for each in contents] == [2, 4, 6]
    assert contents[2][2] == contents[1][2] == " w0 w1 w2"
    assert contents[2][:4] == contents[1]
    assert all(body["max_tokens"] == 3 and body["stream"] for body in server.bodies)


def test_what_was_cached_and_where_is_noted(server: FakeServer, url: str, sessions: list[Session]) -> None:
    records, _ = drive(url, sessions[:1])
    assert [(record.num_prompt_tokens, record.num_cached_tokens) for record in records] == [(10, 5), (17, 8), (24, 12)]
    assert records[2].cached_by == (("gpu", 12),)
    assert records[0].finish_reason == "length"


def test_a_server_that_does_not_count(server: FakeServer, url: str, sessions: list[Session]) -> None:
    server.tells_usage = False
    records, _ = drive(url, sessions[:1])
    assert [(record.num_prompt_tokens, record.num_output_tokens, record.is_counted) for record in records] == [
        (None, 3, False)
    ] * 3


@pytest.mark.parametrize(("failure", "error"), [(503, "503: it is broken"), ("cut", "RemoteProtocolError")])
def test_a_turn_that_fails_ends_its_session(
    server: FakeServer, url: str, sessions: list[Session], failure: int | str, error: str
) -> None:
    server.failing = {4: failure}
    records, _ = drive(url, sessions[:1])
    assert [(record.turn, record.is_good) for record in records] == [(0, True), (1, False)]
    assert records[1].error.startswith(error)


def test_a_server_that_is_not_there() -> None:
    records, _ = drive("http://127.0.0.1:9/v1", [replace(session, start_s=0.0) for session in ()], num_active=1)
    assert records == []


def test_a_closed_loop_has_so_many_at_once(server: FakeServer, url: str, sessions: list[Session]) -> None:
    records, _ = drive(url, sessions, num_active=2)
    assert sorted((record.session_id, record.turn) for record in records) == [
        (f"s{session}", turn) for session in range(3) for turn in range(3)
    ]
    assert server.max_running <= 2


def test_sessions_start_at_their_times(server: FakeServer, url: str, sessions: list[Session]) -> None:
    starts = {"s0": 0.09, "s1": 0.0, "s2": 0.05}
    records, _ = drive(url, [replace(session, start_s=starts[session.session_id]) for session in sessions])
    firsts = [record for record in sorted(records, key=lambda record: record.due_s) if record.turn == 0]
    assert [(record.session_id, record.due_s) for record in firsts] == [("s1", 0.0), ("s2", 0.05), ("s0", 0.09)]
    assert all(record.sent_s >= record.due_s for record in firsts)


def test_nothing_is_sent_after_the_end_of_the_run(server: FakeServer, url: str, sessions: list[Session]) -> None:
    late = [
        replace(sessions[0], start_s=5.0),
        replace(sessions[1], turns=(*sessions[1].turns[:1], replace(sessions[1].turns[1], pause_s=9.0))),
    ]
    records, _ = drive(url, late, max_s=1.0)
    assert [(record.session_id, record.turn) for record in records] == [("s1", 0)]


def test_a_run_that_is_stopped_has_reported_what_is_complete(
    server: FakeServer, url: str, sessions: list[Session]
) -> None:
    server.hangs = True
    records: list[TurnRecord] = []

    async def run() -> None:
        http = Client(Endpoint("fake", url, model="fake"))
        driver = Driver(http, Load("run", Content()), time.perf_counter(), records.append)
        task = asyncio.create_task(driver.run(sessions, itertools.count().__next__))
        while server.num_running < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await http.close()

    asyncio.run(run())
    assert records == []
