"""The connections of a group's workers, beside strangers who reach the same port."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import psutil
import pytest

from engine.core.plan import StepPlan
from engine.errors import EngineError
from engine.executor import plan_channel
from engine.executor.plan_channel import PlanReceiver, PlanSender
from engine.executor.process_group import GroupMember, serve_store

SIZE = 3
# Only a defect waits for it.
PATIENCE_S = 30.0


@pytest.fixture(params=["127.0.0.1", None], ids=["tcp", "unix"])
def sender(request, tmp_path) -> Iterator[PlanSender]:
    lost: list[tuple[int, str]] = []
    sender = PlanSender(
        SIZE, host=request.param, path=str(tmp_path / "plans"), on_lost=lambda rank, why: lost.append((rank, why))
    )
    yield sender
    sender.close(0)
    assert lost == []


def connect(sender: PlanSender) -> socket.socket:
    """As a stranger does."""
    stranger = socket.socket(socket.AF_UNIX if isinstance(sender.address, str) else socket.AF_INET)
    stranger.settimeout(PATIENCE_S)
    stranger.connect(sender.address)
    return stranger


def start_workers(
    sender: PlanSender, authkey: bytes | None = None
) -> tuple[list[PlanReceiver], list[threading.Thread]]:
    receivers: list[PlanReceiver] = []

    def work(rank: int) -> None:
        member = GroupMember(rank, SIZE, "", sender.address, authkey or sender.authkey)
        receivers.append(PlanReceiver(member))

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(1, SIZE)]
    for thread in threads:
        thread.start()
    return receivers, threads


def test_strangers_do_not_hold_up_a_group(sender, monkeypatch, caplog):
    """Who connects first and says nothing, garbage, a wrong key, or leaves: the workers behind them are welcome at once."""
    monkeypatch.setattr(plan_channel, "HANDSHAKE_TIMEOUT_S", int(PATIENCE_S) + 10)
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(sender)) for _ in range(2)]
        garbage = stack.enter_context(connect(sender))
        garbage.sendall(b"GET / HTTP/1.1\r\nhost: me\r\n\r\n" * 100)
        connect(sender).close()
        guesses: list[BaseException] = []

        def guess() -> None:
            try:
                Client(sender.address, authkey=b"a guess")
            except (AuthenticationError, EOFError, OSError) as error:
                guesses.append(error)

        guessing = threading.Thread(target=guess, daemon=True)
        guessing.start()
        receivers, threads = start_workers(sender)
        sender.accept(lambda: None, PATIENCE_S)
        for thread in [*threads, guessing]:
            thread.join(PATIENCE_S)
        plan = StepPlan(7, ())
        sender.send((1, 2), plan, PATIENCE_S)
        assert [receiver.receive() for receiver in receivers] == [((1, 2), plan)] * 2
        assert len(guesses) == 1
        assert [stranger.recv(1) for stranger in silent] != [b"", b""]  # they were asked, and may answer still
        sender.end_step()
        sender.close(0)
        for receiver in receivers:
            receiver.close()


def test_a_silent_stranger_is_hung_up_on(sender, monkeypatch, caplog):
    monkeypatch.setattr(plan_channel, "HANDSHAKE_TIMEOUT_S", 1)
    with connect(sender) as stranger:
        is_over = threading.Event()

        def check() -> None:
            if is_over.is_set():
                raise EngineError("over")

        def read_to_the_end() -> None:
            while stranger.recv(4096):
                pass
            is_over.set()

        reader = threading.Thread(target=read_to_the_end, daemon=True)
        reader.start()
        with pytest.raises(EngineError, match="over"):
            sender.accept(check, PATIENCE_S)
        reader.join(PATIENCE_S)
    assert "a connection that is no worker's" in caplog.text


def test_ranks_that_do_not_come_are_named(sender):
    with connect(sender), pytest.raises(EngineError, match=r"ranks \[1, 2\] of 3 did not connect within 0 s"):
        sender.accept(lambda: None, 0.2)


def test_ports_are_open_on_the_nodes_address_only():
    sender = PlanSender(SIZE, host="127.0.0.2", path="", on_lost=lambda rank, why: None)
    store = serve_store("127.0.0.2")
    try:
        for host, port in (sender.address, ("127.0.0.2", store.port)):
            assert host == "127.0.0.2"
            socket.create_connection((host, port), PATIENCE_S).close()
            # Of this process: on another address, another process may have the same port.
            listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            assert {address.ip for address in listening if address.port == port} == {host}
        store.set("a", "b")
        assert store.get("a") == b"b"
    finally:
        sender.close(0)
