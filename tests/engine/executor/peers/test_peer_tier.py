"""Chunks between engines: what arrives is what was asked for, or nothing; and whatever a peer does, everything ends."""

from __future__ import annotations

import threading
import time

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executor.local import LocalExecutor
from engine.executor.peers.messages import DirectoryRow
from engine.executor.peers.tier import make_peer_tier
from engine.peer_network import PeerNetwork
from tests.engine.executor.peers.peer_engine import PeerEngine, key_of, record_of, wait_until


@pytest.fixture
def engines():
    """Makes engines, of which each knows the earlier ones; all threads have ended at the end."""
    made: list[PeerEngine] = []
    before = set(threading.enumerate())

    def make(name: str, **options) -> PeerEngine:
        engine = PeerEngine(name, **options).run()
        made.append(engine)
        for other in made:
            other.tier.set_peers({peer.name: peer.tier.address for peer in made})
        return engine

    yield make
    for engine in made:
        engine.tier.close()
        engine.tier.close()
    assert not [thread for thread in threading.enumerate() if thread not in before]


def test_a_chunk_goes_from_block_to_block(engines):
    source, target = engines("source"), engines("target")
    source.fill(0, 1, 2, 3)
    transfers = {number: target.load(number, 10 + number, "source") for number in (2, 0, 3, 1)}
    for number, transfer_id in transfers.items():
        end = target.end_of(transfer_id)
        assert end.ok
        assert end.seconds > 0
        assert target.rows[10 + number].tobytes() == source.rows[number].tobytes()
        assert target.checksums.is_intact(10 + number)
    assert all(source.end_of(transfer_id).ok for transfer_id in range(1, 5))
    assert sorted(source.asked) == sorted(key_of(number) for number in range(4))


def test_what_a_source_waits_for_its_own_copies_is_no_time_of_the_tier(engines):
    """As when a chunk has to leave its GPU first; see LoadPrices."""
    source, target = engines("source"), engines("target")
    source.fill(3)
    source.on_send = lambda keys: threading.Timer(0.5, source.send_now, [keys]).start()
    target.tier.set_peers({"source": source.tier.address})
    begin_s = time.perf_counter()
    end = target.end_of(target.load(3, 9, "source"))
    assert end.ok
    assert 0 < end.seconds <= time.perf_counter() - begin_s - 0.5


def test_what_a_peer_does_not_have_is_gone(engines):
    source, target = engines("source"), engines("target")
    source.fill(1)
    gone, there = target.load(7, 10, "source"), target.load(1, 11, "source")
    end = target.end_of(gone)
    assert (end.ok, end.gone, end.seconds) == (False, True, None)
    assert target.end_of(there).ok


def test_a_chunk_that_no_peer_is_known_to_have_is_gone(engines):
    target = engines("target")
    for peer_id in (None, "unknown", "target"):
        end = target.end_of(target.load(1, 10, peer_id))
        assert (end.ok, end.gone) == (False, True)


def test_what_follows_a_tail_does_not_leave_the_process(engines):
    source, target = engines("source"), engines("target")
    source.fill(1, num_tokens=3)
    before = source.rows[1].copy()
    assert target.end_of(target.load(1, 10, "source", num_tokens=3)).ok
    for pools, original in zip(target.cpu.layer_pools, source.cpu.layer_pools, strict=True):
        for pool, other in zip(pools, original, strict=True):
            assert (pool[10, :, :3] == other[1, :, :3]).all()
            assert not pool[10, :, 3:].any()
            assert other[1, :, 3:].any()
    assert (source.rows[1] == before).all()


def test_a_chunk_of_another_length_is_gone(engines):
    source, target = engines("source"), engines("target")
    source.fill(1, num_tokens=3)
    target.rows[10] = 7
    end = target.end_of(target.load(1, 10, "source", num_tokens=2))
    assert (end.ok, end.gone) == (False, True)
    assert (target.rows[10] == 7).all()
    source.fill(2)
    assert target.end_of(target.load(2, 11, "source")).ok, "the connection goes on"


def test_a_damaged_block_is_not_sent(engines):
    source, target = engines("source"), engines("target")
    source.fill(1)
    source.rows[1, 0] ^= 1
    assert target.end_of(target.load(1, 10, "source")).gone
    assert not source.end_of(1).ok


def test_several_peers_may_want_one_chunk(engines):
    source, first, second = engines("source"), engines("first"), engines("second")
    source.fill(1)
    source.on_send = lambda keys: None
    transfers = [engine.load(1, 10, "source") for engine in (first, second)]
    wait_until(lambda: len(source.tier._sends._waiting.get(key_of(1)).connections) == 2 if source.asked else False)
    send = source.start_send(key_of(1))
    assert first.end_of(transfers[0]).ok
    assert second.end_of(transfers[1]).ok
    assert source.end_of(send).ok
    assert source.asked == [key_of(1)], "asked for once"


def test_a_send_that_is_not_waited_for_ends(engines):
    source = engines("source")
    source.fill(1)
    end = source.end_of(source.start_send(key_of(1)))
    assert (end.ok, end.gone) == (False, True)


def test_queries(engines):
    source, target = engines("source"), engines("target")
    source.fill(1, 3)
    found = target.tier.ask("source", [key_of(number) for number in range(4)], 5.0).result()
    assert dict(found.idle_s) == {1: 2.5, 3: 2.5}
    assert found.tails == ((0, 3),)
    source.transcripts["Zoë \ud800"] = b"said"
    assert target.tier.fetch_transcript("source", "Zoë \ud800", 5.0).result() == b"said"
    assert target.tier.fetch_transcript("source", "unknown", 5.0).result() is None
    assert target.tier.fetch_transcript("source", "x" * 5000, 5.0).result() is None
    for tier_call in (
        lambda: target.tier.ask("unknown", [], 5.0),
        lambda: target.tier.fetch_transcript("target", "", 5.0),
    ):
        assert tier_call().result() is None


def test_an_offer_is_taken_or_not(engines):
    source, target = engines("source"), engines("target")
    records = (record_of(1), record_of(2, num_tokens=3, owner_id="Zoë"))
    assert source.tier.offer("target", "chat", records, b"said").result()
    assert target.offers == [("chat", records, b"said", "source")]
    target.takes_offers = False
    assert not source.tier.offer("target", "chat", records, b"said").result()
    target.takes_offers = True
    target.tier.draining = True
    assert not source.tier.offer("target", "chat", records, b"said").result()
    assert len(target.offers) == 2
    assert not source.tier.offer("unknown", "chat", records, b"said").result()


def test_who_knows_a_conversation_is_told(engines, monkeypatch):
    monkeypatch.setattr("engine.executor.peers.tier.REFRESH_INTERVAL_S", 0.02)
    one, two, three = engines("one"), engines("two"), engines("three")
    one.tier.note_conversation("chat", 100)
    two.tier.note_conversation("chat", 300)
    wait_until(lambda: [row.peer_id for row in three.tier.best_peers("chat")] == ["two", "one"])
    assert [row.num_tokens for row in three.tier.best_peers("chat")] == [300, 100]
    two.tier.note_conversation("chat", 0)
    one.tier.note_conversation("chat", 150)
    wait_until(lambda: [row.num_tokens for row in three.tier.best_peers("chat")] == [150])
    assert three.tier.best_peers("another") == []


def test_peers_that_may_have_the_next_turn_are_told_at_once(engines, monkeypatch):
    """They do not ask any more here."""
    one = engines("one")
    one.tier.note_conversation("earlier", 10)
    two, three = engines("two"), engines("three")
    for engine in (two, three):
        wait_until(lambda engine=engine: engine.tier.best_peers("earlier"))
    monkeypatch.setattr("engine.executor.peers.client.Peer.refresh", lambda self: None)
    for num_tokens in (100, 150):
        one.tier.note_conversation("chat", num_tokens, ["two", "unknown"])
        wait_until(lambda n=num_tokens: [row.num_tokens for row in two.tier.best_peers("chat")] == [n])
    assert three.tier.best_peers("chat") == []
    one.tier.note_conversation("chat", 0, ["two"])
    wait_until(lambda: two.tier.best_peers("chat") == [])
    one.tier._peers["two"].hear("a process that is no more", 99, DirectoryRow(b"12345678", 1, 0.0))
    assert one.tier._peers["two"].rows.find(b"12345678", 0.0) is None


NETWORK = PeerNetwork(secret=b"secret", host="127.0.0.1", peer_id="me")


def options(tiny_model, **changes) -> EngineConfig:
    values = {"num_gpu_blocks": 8, "num_cpu_blocks": 8, "chunk_size": 8, "num_threads": 1, "dtype": "float32"}
    return EngineConfig(model=str(tiny_model("llama")), **{**values, **changes})


def test_the_options_decide_whether_there_is_one(tiny_model):
    executor = LocalExecutor(options(tiny_model))
    try:
        assert make_peer_tier(options(tiny_model), executor, None) is None
        assert make_peer_tier(options(tiny_model, kv_handover="off"), executor, NETWORK) is None
        for rate, expected in ((None, 200e6), (0.0, 0.0), (3.5, 3.5e6)):
            tier = make_peer_tier(options(tiny_model, kv_transfer_rate=rate, kv_handover="on"), executor, NETWORK)
            assert tier.address[0] == "127.0.0.1"
            assert tier.spec.name == "peer"
            assert not tier.spec.is_store
            assert tier._loads._rate.bytes_per_s == tier._sends._rate.bytes_per_s == expected
            tier.close()
    finally:
        executor.shutdown()
    executor = LocalExecutor(options(tiny_model, num_cpu_blocks=0))
    try:
        assert make_peer_tier(options(tiny_model, num_cpu_blocks=0), executor, NETWORK) is None
        with pytest.raises(ConfigError, match="kv_handover needs a CPU tier") as raised:
            make_peer_tier(options(tiny_model, num_cpu_blocks=0, kv_handover="on"), executor, None)
        assert raised.value.param == "kv_handover"
    finally:
        executor.shutdown()
