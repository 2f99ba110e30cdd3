"""Whatever a peer or the way to it does: a miss, never a wrong block, never a thread that stays."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import pytest

from engine.attention.protocol import LayerShape
from engine.executor.peers.protocol import HEADER_BYTES, VERSION, Greeting, Kind, pack_frame, pack_hail, unpack_header
from engine.executor.peers.socket import PeerSocket, greet
from tests.engine.executor.peers.peer_engine import CHUNK_SIZE, HOST, IDENTITY, SECRET, PeerEngine, key_of, wait_until
from tests.nightly import IS_NIGHTLY

# Of every so many places one is tried.
STRIDE = 1 if IS_NIGHTLY else 13
NUM_ROUNDS = 300 if IS_NIGHTLY else 40
LARGE = [LayerShape(8, 2048, 2048)]  # blocks of 1 MiB


@pytest.fixture(autouse=True)
def no_grudge(monkeypatch):
    """A peer that failed is tried again at once."""
    monkeypatch.setattr("engine.executor.peers.timing.FIRST_BACK_OFF_S", 0.0)


@pytest.fixture
def impatient(monkeypatch):
    """Nothing of a peer is waited for for long."""
    monkeypatch.setattr("engine.executor.peers.socket.HANDSHAKE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("engine.executor.peers.connection.CONTENT_TIMEOUT_S", 0.2)
    monkeypatch.setattr("engine.executor.peers.loads.BLOCK_TIMEOUT_S", 0.2)


@pytest.fixture
def closing():
    """What has to be closed at the end; all threads have ended then."""
    things: list = []
    before = set(threading.enumerate())
    yield lambda thing: things.append(thing) or thing
    for thing in reversed(things):
        thing.close()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread not in before])


@pytest.fixture
def engine(closing):
    """Makes an engine that runs."""

    def make(name: str, **options) -> PeerEngine:
        made = PeerEngine(name, **options).run()
        closing(made.tier)
        return made

    return make


class Relay:
    """A way to a peer that may change or cut what comes from there."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.edit: Callable[[int, bytes], bytes] = lambda _, data: data
        self.num_bytes = 0
        self._listener = socket.create_server((HOST, 0))
        self.address = self._listener.getsockname()[:2]
        self._to = address
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def drop(self) -> None:
        """End all connections."""
        for tcp in self._sockets:
            with suppress(OSError):
                tcp.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.drop()
        for thread in self._threads:
            thread.join()
        for tcp in (self._listener, *self._sockets):
            tcp.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(self._to)
                self._sockets += (here, there)
                self._start(self._pump, here, there, None)
                self._start(self._pump, there, here, self.edit)

    def _pump(self, source: socket.socket, target: socket.socket, edit) -> None:
        offset = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                edited = data if edit is None else edit(offset, data)
                target.sendall(edited)
                offset += len(data)
                if edit is not None:
                    self.num_bytes = max(self.num_bytes, offset)
                if len(edited) < len(data):
                    break
        for tcp in (source, target):
            with suppress(OSError):
                tcp.shutdown(socket.SHUT_RDWR)


def cut_at(place: int) -> Callable[[int, bytes], bytes]:
    def edit(offset: int, data: bytes) -> bytes | None:
        return data[: max(0, place - offset)]

    return edit


def flip(bit: int) -> Callable[[int, bytes], bytes]:
    def edit(offset: int, data: bytes) -> bytes | None:
        if offset <= bit // 8 < offset + len(data):
            changed = bytearray(data)
            changed[bit // 8 - offset] ^= 1 << bit % 8
            return bytes(changed)
        return data

    return edit


@pytest.mark.parametrize("what", ["cut", "flipped"])
@pytest.mark.usefixtures("impatient")
def test_a_stream_that_is_cut_or_changed_anywhere(engine, closing, what):
    """From the first byte that the source says to the last one, in all that it says."""
    source, target = engine("source"), engine("target")
    source.fill(1)
    relay = closing(Relay(source.tier.address))
    target.tier.set_peers({"source": relay.address})
    rng = random.Random(what)

    def load() -> bool:
        target.rows[10] = 0
        end = target.end_of(target.load(1, 10, "source"))
        is_right = (target.rows[10] == source.rows[1]).all()
        assert is_right or not end.ok
        return end.ok

    def hang_up() -> None:
        relay.drop()
        wait_until(lambda: not target.tier._peers["source"].is_connected())

    wait_until(load)
    num_bytes, num_failed = relay.num_bytes, 0
    hang_up()
    places = range(rng.randrange(STRIDE), num_bytes, STRIDE)
    for place in places:
        relay.edit = cut_at(place) if what == "cut" else flip(8 * place + rng.randrange(8))
        num_failed += not load()
        hang_up()
    assert num_failed == len(places), "every byte counts"
    relay.edit = lambda _, data: data
    wait_until(load)


# -- a source that is none -------------------------------------------------------------------------------------------------


class Listener:
    """Says what a script says, to each that connects."""

    def __init__(self, script: Callable[[socket.socket], None], port: int = 0) -> None:
        self._listener = socket.create_server((HOST, port))
        self.address = self._listener.getsockname()[:2]
        self._script = script
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for tcp in self._sockets:
            with suppress(OSError):
                tcp.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for tcp in (self._listener, *self._sockets):
            tcp.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                tcp, _ = self._listener.accept()
                self._sockets.append(tcp)
                self._threads.append(threading.Thread(target=self._run, args=(tcp,)))
                self._threads[-1].start()

    def _run(self, tcp: socket.socket) -> None:
        with suppress(OSError):
            self._script(tcp)
        with suppress(OSError):
            tcp.shutdown(socket.SHUT_RDWR)


def greeting_of(engine: PeerEngine, name: str, **changes) -> Greeting:
    values = {
        "peer_id": name,
        "incarnation": f"of {name}",
        "identity": IDENTITY.hex(),
        "block_bytes": engine.rows.shape[1],
        "chunk_size": CHUNK_SIZE,
    }
    return Greeting(**{**values, **changes})


def wait_for_end(tcp: socket.socket) -> None:
    while tcp.recv(1 << 16):
        pass


def trickle(tcp: socket.socket, content: bytes) -> None:
    for i in range(len(content)):
        tcp.sendall(content[i : i + 1])
        time.sleep(0.05)


def misses(target: PeerEngine, address: tuple[str, int]) -> None:
    """Everything that is asked of that address ends, with nothing; and the engine goes on."""
    target.tier.set_peers({"source": address})
    found = target.tier.ask("source", [key_of(1)], 5.0)
    end = target.end_of(target.load(1, 10, "source"))
    assert (end.ok, end.gone) == (False, True)
    assert found.result(20) is None


@pytest.mark.usefixtures("impatient")
def test_a_peer_that_says_nothing(engine, closing):
    misses(engine("target"), closing(Listener(wait_for_end)).address)


@pytest.mark.usefixtures("impatient")
def test_a_peer_that_trickles(engine, closing):
    misses(engine("target"), closing(Listener(lambda tcp: trickle(tcp, pack_hail(bytes(32))))).address)


def test_a_peer_that_is_not_there(engine):
    with socket.create_server((HOST, 0)) as listener:
        address = listener.getsockname()[:2]
    misses(engine("target"), address)


@pytest.mark.parametrize(
    "hail", [b"HTTP/1.1 200 OK".ljust(42), pack_hail(bytes(32))[:8] + bytes([VERSION + 1, 0]).ljust(34)]
)
def test_a_peer_of_another_language_or_version(engine, closing, hail, caplog):
    def say(tcp: socket.socket) -> None:
        tcp.sendall(hail)
        wait_for_end(tcp)

    target = engine("target")
    misses(target, closing(Listener(say)).address)
    misses(target, closing(Listener(say)).address)
    told = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) <= 2, "once for each address, and not for each connection"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"secret": b"another"}, "secret"),
        ({"identity": b"j" * 16}, "identity"),
        ({"layers": [LayerShape(1, 1, 1)]}, "block_bytes"),
    ],
    ids=["secret", "identity", "layers"],
)
def test_an_engine_of_another_kind(engine, options, why, caplog):
    source, target = engine("source", **options), engine("target")
    source.chunks[key_of(1)] = (1, CHUNK_SIZE)
    misses(target, source.tier.address)
    assert any(why in record.message for record in caplog.records)
    assert source.asked == []


def test_an_engine_does_not_ask_itself(engine, caplog):
    itself = engine("target")
    itself.fill(1)
    misses(itself, itself.tier.address)
    assert any("itself" in record.message for record in caplog.records)


def test_another_engine_at_a_peers_address(engine, caplog):
    other, target = engine("other"), engine("target")
    other.fill(1)
    misses(target, other.tier.address)
    assert any("other has its address now" in record.message for record in caplog.records)


class FakeSource:
    """A peer that knows the secret, and answers a request for chunks as it likes."""

    def __init__(
        self, target: PeerEngine, closing, answer: Callable[[socket.socket, list[bytes]], None], **changes
    ) -> None:
        self._ours = greeting_of(target, "source", **changes)
        self._block_bytes = target.rows.shape[1]
        self._answer = answer
        self.num_connections = 0
        self.address = closing(Listener(self._serve)).address

    def _serve(self, tcp: socket.socket) -> None:
        connection = PeerSocket(tcp)
        greet(connection, SECRET, self._ours, is_client=False)
        self.num_connections += 1
        while True:
            header = unpack_header(connection.receive(HEADER_BYTES, 20.0), self._block_bytes)
            content = connection.receive(header.length, 20.0)
            if header.kind is Kind.GET:
                self._answer(tcp, [content[i : i + 32] for i in range(0, len(content), 32)])
            elif header.kind is Kind.DIRECTORY:
                tcp.sendall(b"".join(pack_frame(Kind.ANSWER, bytes(8), number=header.number)))


def send_frame(tcp: socket.socket, *arguments, **options) -> None:
    tcp.sendall(b"".join(pack_frame(*arguments, **options)))


@pytest.fixture
def fake(engine, closing):
    """Makes a target, and a source that answers as is said."""

    def make(answer, **changes) -> PeerEngine:
        target = engine("target")
        target.tier.set_peers({"source": FakeSource(target, closing, answer, **changes).address})
        return target

    return make


CONTENT = bytes(range(192)) * 2


@pytest.mark.parametrize("is_right", [True, False])
def test_a_chunk_that_was_not_asked_for(fake, is_right):
    """Before the right one, or instead."""

    def answer(tcp, keys):
        send_frame(tcp, Kind.BLOCK, CONTENT, key=b"x" * 32, num_tokens=CHUNK_SIZE)
        if is_right:
            send_frame(tcp, Kind.BLOCK, CONTENT[::-1], key=keys[0], num_tokens=CHUNK_SIZE)
        send_frame(tcp, Kind.GONE, keys[0] + b"y" * 32)

    target = fake(answer)
    target.rows[10] = 7
    end = target.end_of(target.load(1, 10, "source"))
    assert (end.ok, end.gone) == (is_right, not is_right)
    assert target.rows[10].tobytes() == (CONTENT[::-1] if is_right else b"\7" * 384)


@pytest.mark.parametrize("num_bytes", [0, 1, 383, 385, 1 << 20])
def test_a_block_of_another_length(fake, num_bytes):
    target = fake(lambda tcp, keys: send_frame(tcp, Kind.BLOCK, bytes(num_bytes), key=keys[0], num_tokens=CHUNK_SIZE))
    end = target.end_of(target.load(1, 10, "source"))
    assert (end.ok, end.gone) == (False, True)


def test_another_content_than_its_checksum_says(fake):
    def answer(tcp, keys):
        head, content = pack_frame(Kind.BLOCK, CONTENT, key=keys[0], num_tokens=CHUNK_SIZE)
        tcp.sendall(head + content[:-1] + b"x")

    target = fake(answer)
    for _ in range(2):
        end = target.end_of(target.load(1, 10, "source"))
        assert (end.ok, end.gone) == (False, False), "the connection goes on"


def test_a_source_that_says_it_waited_longer_than_it_took(fake):
    """The time in which the content came counts in any case."""
    target = fake(
        lambda tcp, keys: send_frame(tcp, Kind.BLOCK, CONTENT, number=2**64 - 1, key=keys[0], num_tokens=CHUNK_SIZE)
    )
    end = target.end_of(target.load(1, 10, "source"))
    assert end.ok
    assert end.seconds > 0


@pytest.mark.usefixtures("impatient")
def test_a_block_that_stops_coming(fake):
    def answer(tcp, keys):
        tcp.sendall(b"".join(pack_frame(Kind.BLOCK, CONTENT, key=keys[0], num_tokens=CHUNK_SIZE))[:-1])

    target = fake(answer)
    end = target.end_of(target.load(1, 10, "source"))
    assert (end.ok, end.gone) == (False, True)


@pytest.mark.usefixtures("impatient")
def test_a_block_that_trickles(fake):
    def answer(tcp, keys):
        head, content = pack_frame(Kind.BLOCK, CONTENT, key=keys[0], num_tokens=CHUNK_SIZE)
        tcp.sendall(head)
        trickle(tcp, content)  # would take 20 seconds

    target = fake(answer)
    start_s = time.monotonic()
    assert target.end_of(target.load(1, 10, "source")).gone
    assert time.monotonic() - start_s < 15


def test_a_frame_that_is_no_answer(fake):
    target = fake(lambda tcp, keys: send_frame(tcp, Kind.FIND, keys[0]))
    assert target.end_of(target.load(1, 10, "source")).gone


def test_a_peer_that_does_not_answer(fake, monkeypatch):
    """Its connection is closed after a while, all that waits has ended, and what is asked later goes over a new one."""
    monkeypatch.setattr("engine.executor.peers.lanes.STALL_S", 0.1)
    monkeypatch.setattr("engine.executor.peers.lanes.WATCH_INTERVAL_S", 0.02)
    answers = [lambda tcp, keys: None]

    target = fake(lambda tcp, keys: answers[0](tcp, keys))
    transfers = [target.load(number, 10 + number, "source") for number in range(3)]
    assert all(target.end_of(transfer_id).gone for transfer_id in transfers)
    assert target.tier.ask("source", [key_of(1)], 0.05).result(20) is None
    assert target.tier.fetch_transcript("source", "chat", 0.05).result(20) is None
    assert target.tier.offer("source", "chat", [], b"", 0.05).result(20) is False
    monkeypatch.setattr("engine.executor.peers.lanes.STALL_S", 20.0)
    answers[0] = lambda tcp, keys: [
        send_frame(tcp, Kind.BLOCK, CONTENT, key=key, num_tokens=CHUNK_SIZE) for key in keys
    ]
    assert target.end_of(target.load(1, 10, "source")).ok


def test_a_chunk_that_comes_too_late_is_not_written(fake, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.lanes.MAX_LOAD_S", 0.1)
    monkeypatch.setattr("engine.executor.peers.lanes.WATCH_INTERVAL_S", 0.02)
    asked: list[tuple[socket.socket, bytes]] = []
    target = fake(lambda tcp, keys: asked.extend((tcp, key) for key in keys))
    assert target.end_of(target.load(1, 10, "source")).gone
    monkeypatch.setattr("engine.executor.peers.lanes.MAX_LOAD_S", 20.0)
    target.rows[10] = 7
    send_frame(asked[0][0], Kind.BLOCK, CONTENT, key=key_of(1), num_tokens=CHUNK_SIZE)
    transfer_id = target.load(2, 11, "source")
    wait_until(lambda: len(asked) == 2)
    send_frame(asked[1][0], Kind.BLOCK, CONTENT, key=key_of(2), num_tokens=CHUNK_SIZE)
    assert target.end_of(transfer_id).ok
    assert (target.rows[10] == 7).all()


def test_a_connection_without_work_is_closed(fake, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.lanes.IDLE_S", 0.05)
    monkeypatch.setattr("engine.executor.peers.lanes.WATCH_INTERVAL_S", 0.02)
    target = fake(lambda tcp, keys: send_frame(tcp, Kind.GONE, b"".join(keys)))
    peer = target.tier._peers["source"]
    for _ in range(2):
        assert target.end_of(target.load(1, 10, "source")).gone
        wait_until(lambda: peer._blocks is None)
    assert not peer.is_aside()


def test_a_peer_that_restarts_has_nothing_of_before(engine, closing, monkeypatch):
    """On the same address, under the same name: its directory is another one."""
    monkeypatch.setattr("engine.executor.peers.tier.REFRESH_INTERVAL_S", 0.02)
    target, source = engine("target"), engine("source")
    relay = closing(Relay(source.tier.address))
    for number in range(5):
        source.tier.note_conversation(f"chat {number}", 10)
    target.tier.set_peers({"source": relay.address})
    wait_until(lambda: len(target.tier.best_peers("chat 3")) == 1)
    again = engine("source")
    again.tier.note_conversation("chat 0", 20)
    again.fill(1)
    relay._to = again.tier.address
    source.tier.close()
    wait_until(lambda: [row.num_tokens for row in target.tier.best_peers("chat 0")] == [20])
    assert target.tier.best_peers("chat 3") == []
    assert target.end_of(target.load(1, 10, "source")).ok


def test_a_peer_is_forgotten_when_it_and_its_connection_are_gone(engine, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.tier.REFRESH_INTERVAL_S", 0.02)
    target, source = engine("target"), engine("source")
    source.fill(1)
    source.tier.note_conversation("chat", 10)
    target.tier.set_peers({"source": source.tier.address})
    wait_until(lambda: target.tier.best_peers("chat"))
    target.tier.set_peers({})
    time.sleep(0.1)
    assert target.tier.best_peers("chat"), "it may be draining"
    assert target.end_of(target.load(1, 10, "source")).ok
    source.tier.close()
    wait_until(lambda: not target.tier._peers)
    assert target.tier.best_peers("chat") == []


def test_a_peer_that_failed_is_left_alone_for_a_while(engine, closing, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.timing.FIRST_BACK_OFF_S", 1000.0)
    monkeypatch.setattr("engine.executor.peers.timing.LONGEST_BACK_OFF_S", 1000.0)
    connected = []

    def hang_up(tcp: socket.socket) -> None:
        connected.append(tcp)

    target = engine("target")
    target.tier.set_peers({"source": closing(Listener(hang_up)).address})
    wait_until(lambda: target.tier._peers["source"].is_aside() and not target.tier._peers["source"].is_connected())
    num_connected = len(connected)
    assert target.tier.ask("source", [], 1000.0).done()
    assert target.tier.offer("source", "chat", [], b"").result(0) is False
    assert target.end_of(target.load(1, 10, "source")).gone
    assert target.tier.best_peers("chat") == []
    assert len(connected) == num_connected


# -- a target that is none -------------------------------------------------------------------------------------------------


def connect(engine: PeerEngine, closing) -> socket.socket:
    tcp = closing(socket.create_connection(engine.tier.address))
    tcp.settimeout(20)
    return tcp


def connect_as_peer(engine: PeerEngine, closing, **changes) -> socket.socket:
    tcp = closing(socket.create_connection(engine.tier.address))
    greet(PeerSocket(tcp), SECRET, greeting_of(engine, "fake", **changes), is_client=True)
    return tcp


def serves(source: PeerEngine, target: PeerEngine) -> None:
    source.fill(1)
    target.tier.set_peers({"source": source.tier.address})
    assert target.end_of(target.load(1, 10, "source")).ok


@pytest.mark.parametrize(
    "content", [b"", b"GET / HTTP/1.1\r\n\r\n" * 9, bytes(1000), pack_hail(bytes(32)) + bytes(2000)]
)
def test_strangers_are_turned_away_unread(engine, closing, content):
    source, target = engine("source"), engine("target")
    strangers = [connect(source, closing) for _ in range(3)]
    for tcp in strangers:
        with suppress(OSError):
            tcp.sendall(content)
    serves(source, target)
    for tcp in strangers:
        with suppress(ConnectionError):
            assert len(tcp.recv(1000, socket.MSG_WAITALL)) == 42, "its hail is all that they get"
    assert source.asked == [key_of(1)]


def test_a_proof_that_was_overheard_or_sent_back_is_of_no_use(engine, closing):
    source = engine("source")
    tcp = connect(source, closing)
    hail = tcp.recv(42, socket.MSG_WAITALL)
    tcp.sendall(hail + bytes(32))  # the same nonce, as if it was ours
    with suppress(ConnectionError):
        assert tcp.recv(1) == b""


def test_there_are_only_so_many_connections(engine, closing, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.server.MAX_CONNECTIONS", 3)
    monkeypatch.setattr("engine.executor.peers.socket.HANDSHAKE_TIMEOUT_S", 20.0)
    source, target = engine("source"), engine("target")
    strangers = [connect(source, closing) for _ in range(8)]
    num_served = 0
    for tcp in strangers:
        with suppress(ConnectionError):
            num_served += len(tcp.recv(42, socket.MSG_WAITALL)) == 42
    assert num_served == 3
    for tcp in strangers:
        tcp.close()
    wait_until(lambda: not source.tier._server._connections)
    serves(source, target)


@pytest.mark.parametrize(
    "frame",
    [
        (Kind.BLOCK, bytes(384)),
        (Kind.ANSWER, b""),
        (Kind.GET, b"too short"),
        (Kind.DIRECTORY, b""),
        (Kind.TOLD, bytes(8)),
        (Kind.TOLD, bytes(20)),
        (Kind.TRANSCRIPT, b"\xff"),
        (Kind.OFFER, b"\xff" * 20),
    ],
    ids=lambda frame: frame[0].name,
)
def test_a_peer_that_says_what_it_may_not(engine, closing, frame):
    source, target = engine("source"), engine("target")
    tcp = connect_as_peer(source, closing)
    send_frame(tcp, *frame)
    with suppress(ConnectionError):
        wait_for_end(tcp)
    serves(source, target)
    assert source.offers == []


def test_any_bytes_after_the_greeting(engine, closing):
    source, target = engine("source"), engine("target")
    rng = random.Random(0)
    for _ in range(10):
        tcp = connect_as_peer(source, closing)
        with suppress(OSError):
            tcp.sendall(rng.randbytes(rng.randrange(200)))
            tcp.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            wait_for_end(tcp)
    serves(source, target)


def test_a_peer_that_does_not_read(engine, closing, monkeypatch):
    """Its transfers end, so that their blocks are free again; others get their chunks meanwhile."""
    monkeypatch.setattr("engine.executor.peers.sends.SEND_TIMEOUT_S", 0.2)
    source, target = engine("source", layers=LARGE, num_blocks=17), engine("target", layers=LARGE, num_blocks=17)
    source.fill(1)
    for number in range(2, 17):
        source.chunks[key_of(number)] = (1, CHUNK_SIZE)
    tcp = connect_as_peer(source, closing)
    send_frame(tcp, Kind.GET, b"".join(map(key_of, range(1, 17))))
    wait_until(lambda: len(source.asked) == 16)
    source.tier._sends.timeout_s = 20.0  # of later connections
    target.tier.set_peers({"source": source.tier.address})
    assert target.end_of(target.load(1, 10, "source")).ok
    ends = [source.end_of(transfer_id) for transfer_id in range(1, 18)]
    assert not all(end.ok for end in ends)
    assert all(end.ok or end.gone for end in ends)


def test_a_peer_that_vanishes_before_its_chunks_are_ready(engine, closing):
    source, target = engine("source"), engine("target")
    source.fill(1)
    source.on_send = lambda keys: None
    tcp = connect_as_peer(source, closing)
    send_frame(tcp, Kind.GET, key_of(1))
    wait_until(lambda: source.asked)
    tcp.close()
    wait_until(lambda: not source.tier._server._connections)
    target.tier.set_peers({"source": source.tier.address})
    transfer_id = target.load(1, 10, "source")
    wait_until(lambda: len(source.tier._sends._waiting[key_of(1)].connections) == 2)
    assert source.end_of(source.start_send(key_of(1))).ok
    assert target.end_of(transfer_id).ok
    tcp = connect_as_peer(source, closing)
    send_frame(tcp, Kind.GET, key_of(1))
    wait_until(lambda: len(source.asked) == 2)
    tcp.close()
    wait_until(lambda: len(source.tier._server._connections) == 2)
    end = source.end_of(source.start_send(key_of(1)))
    assert (end.ok, end.gone) == (False, True)


# -- the engine itself -----------------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_decide(engine, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.sends.MAX_WAIT_S", 0.05)
    source, target = engine("source"), engine("target")
    source.fill(1)
    source.on_send = lambda keys: None
    target.tier.set_peers({"source": source.tier.address})
    assert target.end_of(target.load(1, 10, "source")).gone
    source.on_send = source.send_now
    monkeypatch.setattr("engine.executor.peers.sends.MAX_WAIT_S", 20.0)
    assert target.end_of(target.load(1, 10, "source")).ok


def test_an_engine_that_fails_to_answer(engine, monkeypatch):
    source, target = engine("source"), engine("target")
    source.fill(1)
    target.tier.set_peers({"source": source.tier.address})

    def fail(*_):
        raise RuntimeError("the engine is shut down")

    failed: Future = Future()
    failed.set_exception(RuntimeError("the engine is shut down"))
    for handler in ("find", "on_send", "transcript", "offered"):
        monkeypatch.setattr(source, handler, fail)
    assert target.tier.ask("source", [key_of(1)], 20.0).result() is None
    assert target.tier.fetch_transcript("source", "chat", 20.0).result() is None
    assert target.tier.offer("source", "chat", [], b"").result() is False
    assert target.end_of(target.load(1, 10, "source")).gone
    monkeypatch.setattr(source, "transcript", lambda _: failed)
    assert target.tier.fetch_transcript("source", "chat", 20.0).result() is None


def test_queries_may_be_cancelled_and_are_bounded(engine, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.server.MAX_QUERIES", 3)
    source, target = engine("source"), engine("target")
    open_queries: list[Future] = []
    monkeypatch.setattr(source, "transcript", lambda _: open_queries.append(Future()) or open_queries[-1])
    target.tier.set_peers({"source": source.tier.address})
    asked = [target.tier.fetch_transcript("source", "chat", 20.0) for _ in range(5)]
    wait_until(lambda: sum(future.done() for future in asked) == 2)
    waiting = [future for future in asked if not future.done()]
    assert waiting[0].cancel()
    for future in open_queries:
        future.set_result(b"said")
    assert [future.result(20) for future in waiting[1:]] == [b"said", b"said"]
    assert target.tier.fetch_transcript("source", "chat", 0.0).result(20) is None
    wait_until(lambda: len(open_queries) == 4)
    open_queries[-1].set_result(b"x" * 100)
    assert target.tier.ask("source", [], 20.0).result() is not None


def test_everything_ends_when_an_engine_is_closed(engine, closing):
    """While peers wait for each other: queries, loads and sends under way."""
    source, target = engine("source"), engine("target")
    source.fill(1)
    source.on_send = lambda keys: None
    source.transcript = lambda _: Future()
    target.tier.set_peers({"source": source.tier.address})
    transfer_id = target.load(1, 10, "source")
    future = target.tier.fetch_transcript("source", "chat", 1000.0)
    wait_until(lambda: source.asked)
    stranger = connect(source, closing)
    target.tier.close()
    assert future.result(0) is None
    assert target.end_of(transfer_id).gone
    assert target.end_of(target.load(1, 11, "source")).gone, "and nothing begins any more"
    assert target.tier.ask("source", [], 1000.0).result(0) is None
    target.tier.set_peers({"source": source.tier.address, "another": source.tier.address})
    source.tier.close()
    with suppress(ConnectionError):
        wait_for_end(stranger)


def test_without_a_port_an_engine_still_pulls(engine, monkeypatch, caplog):
    source = engine("source")

    def refuse(*_, **__):
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    target = engine("target")
    assert target.tier.address is None
    assert "Cannot assign" in target.tier.problem
    assert any("peers get no KV from here" in record.message for record in caplog.records)
    serves(source, target)


def test_a_drain_sends_without_a_bound(engine):
    source, target = engine("source", rate=1e-6), engine("target")  # a byte a second
    source.tier.draining = True
    assert source.tier.draining
    source.fill(1, 2, 3)
    target.tier.set_peers({"source": source.tier.address})
    transfers = [target.load(number, 10 + number, "source") for number in (1, 2, 3)]
    assert all(target.end_of(transfer_id).ok for transfer_id in transfers)


def test_a_rate_bounds_what_is_sent(engine):
    source, target = engine("source", rate=1e-6), engine("target")
    source.fill(1, 2)
    target.tier.set_peers({"source": source.tier.address})
    first, second = target.load(1, 11, "source"), target.load(2, 12, "source")
    assert target.end_of(first).ok
    wait_until(lambda: source.asked == [key_of(1), key_of(2)])
    assert not target.tier.poll()
    source.tier.close()
    assert target.end_of(second).gone


def test_without_threads_an_engine_goes_on(engine, monkeypatch):
    source, target = engine("source"), engine("target")
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(("peer-ask", "peer-serve")):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    misses(target, source.tier.address)
    with socket.create_connection(source.tier.address) as tcp:
        wait_for_end(tcp)
    monkeypatch.undo()
    wait_until(lambda: target.tier.ask("source", [], 20.0).result() is not None)
    serves(source, target)


def test_a_peer_that_does_not_tell_its_directory_has_vanished(engine, closing, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.client.DIRECTORY_TIMEOUT_S", 0.05)

    def say_nothing(tcp: socket.socket) -> None:
        greet(PeerSocket(tcp), SECRET, greeting_of(target, "source"), is_client=False)
        wait_for_end(tcp)
        ended.set()

    target, ended = engine("target"), threading.Event()
    target.tier.set_peers({"source": closing(Listener(say_nothing)).address})
    future = target.tier.ask("source", [], 1000.0)
    assert ended.wait(20)
    assert future.result(20) is None


def test_a_peer_that_is_silent_for_long_has_vanished(engine, closing, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.connection.SILENCE_S", 0.1)
    source = engine("source")
    tcp = connect_as_peer(source, closing)
    wait_for_end(tcp)
    wait_until(lambda: not source.tier._server._connections)


def test_any_disorder(engine, closing):
    """Engines that pull from each other over ways that break, while chunks come and go: no wrong one ever arrives."""
    rng, num_right = random.Random(2), 0
    engines = [engine(name, num_blocks=32) for name in ("one", "two", "three")]
    relays = {each.name: closing(Relay(each.tier.address)) for each in engines}
    for each in engines:
        each.tier.set_peers({name: relay.address for name, relay in relays.items() if name != each.name})
        each.fill(*range(14))
        each.rows[12:14] = 0  # damaged, as their checksums say
    present = {key_of(number): (number, CHUNK_SIZE) for number in range(14)}
    for _ in range(NUM_ROUNDS):
        loads = []
        for block in range(16, 24):
            target, number = rng.choice(engines), rng.randrange(16)  # the last two are nowhere
            transfer_id = target.load(number, block, rng.choice(engines).name)
            loads.append((target, number, block, transfer_id))
            if rng.random() < 0.1:
                rng.choice(list(relays.values())).drop()
            if rng.random() < 0.2:
                rng.choice(engines).chunks = {key: place for key, place in present.items() if rng.random() < 0.8}
        for target, number, block, transfer_id in loads:
            if target.end_of(transfer_id).ok:
                assert number < 12
                assert target.rows[block].tobytes() == random.Random(number).randbytes(target.rows.shape[1])
                num_right += 1
    assert num_right > NUM_ROUNDS


def test_a_low_rate_is_no_fault_of_a_peer(engine, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.lanes.STALL_S", 0.0)
    monkeypatch.setattr("engine.executor.peers.lanes.WATCH_INTERVAL_S", 0.01)
    source = engine("source")
    target = engine("target", rate=384 / 0.2 / 1e6)  # 0.2 s for a block
    assert 0.1 < target.tier._loads.pace_s < 0.3
    target.tier._loads.pace_s = 20.0
    source.fill(1, 2)
    target.tier.set_peers({"source": source.tier.address})
    transfers = [target.load(number, 10 + number, "source") for number in (1, 2)]
    assert all(target.end_of(transfer_id).ok for transfer_id in transfers)
