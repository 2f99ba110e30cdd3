"""Hand-over between simulated replicas: what they say to each other, and how long it takes.

What is handed over, in which order and whether it pays is decided by the cores; see engine/core/handover.py. Here is what the
live engine has around them (engine/peer_link.py, engine/executor/peers), with time instead of sockets:

    a request comes     ask ──▶ find_chunks ──▶ the request is added, and expects what was found
    its loads start     get ──▶ start_sends ──▶ a transfer of the core that has them ──▶ block, on the links of both
    a replica drains    offer ──▶ accept_offer ──▶ loads as above ──▶ the next offer

Not simulated: what goes wrong with a connection that stays, and the transcripts that go with offers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

from engine.core.cache.handover import Handover
from engine.core.cache.index import root_key
from engine.core.cache_map import ContextKeys, count_computed_chunks, tail_keys
from engine.core.engine_core import EngineCore
from engine.core.handover import (
    MAX_OFFERED,
    MAX_OFFERED_CHUNKS,
    MAX_OFFERS_AT_ONCE,
    ContextQuery,
    FoundChunks,
    records_of,
)
from engine.core.plan import ChunkRecord, SlowTransfer, TransferEnd
from engine.core.request import Request
from engine.core.tier_table import PEER
from engine.simulator.directory import Directory
from engine.simulator.events import ARRIVAL, END_OF_TRANSFER, Events
from engine.simulator.links import Link

# As live: when a chunk that does not come is given up, and how often that is looked at; in seconds.
MAX_LOAD_S = 8.0
WATCH_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """Between replicas.

    bytes_per_s: out of each replica, and into it. latency_s: of a message. rate_bytes_per_s: what kv_transfer_rate allows,
    out and in; None = all. A replica that ends is not bound by it.
    """

    bytes_per_s: float = 12.5e9
    latency_s: float = 0.0005
    rate_bytes_per_s: float | None = None


class Driver(Protocol):
    """A replica, as its end of the network sees it."""

    core: EngineCore

    def run(self, command: Callable[[], None], now: float) -> None:
        """Let the core do something beside its steps, and then whatever follows from it."""
        ...

    def end_transfer(self, now: float, end: TransferEnd) -> None:
        """A transfer of the core has ended."""
        ...


class Network:
    """The replicas that hand over to each other, and the messages between them."""

    def __init__(self, spec: NetworkSpec, events: Events, bytes_per_block: float) -> None:
        self.spec = spec
        self.events = events
        self.bytes_per_block = bytes_per_block
        self.directory = Directory()
        self._peers: dict[int, Peer] = {}

    def join(self, peer_id: int, replica: Driver, now: float) -> Peer:
        """A replica has started. peer_id: no other one has had it."""
        peer = self._peers[peer_id] = Peer(peer_id, replica, self, now)
        return peer

    def leave(self, peer_id: int, now: float) -> None:
        """A replica has gone, with all that it was about to send."""
        gone = self._peers.pop(peer_id)
        self.directory.forget_peer(peer_id)
        gone.give_up(now)
        for peer in self._peers.values():
            peer.note_gone(peer_id, now)

    def has(self, peer_id: int) -> bool:
        return peer_id in self._peers

    def post(self, time_s: float, receiver_id: int, method: Callable[..., None], *arguments: Any) -> None:
        """A message that leaves then: `method` of the receiver with the time of its arrival, if that one is there by then."""
        self.events.add(time_s + self.spec.latency_s, ARRIVAL, self._deliver, (receiver_id, method, arguments))

    def _deliver(self, now: float, message: tuple[int, Callable[..., None], tuple[Any, ...]]) -> None:
        receiver_id, method, arguments = message
        peer = self._peers.get(receiver_id)
        if peer is not None:
            method(peer, now, *arguments)


class Known(NamedTuple):
    """A conversation that had a turn here, or was left here: the names of its full chunks, and the tokens behind them."""

    num_tokens: int
    tenant: str
    full: Sequence[bytes]
    tail: Sequence[int]

    @classmethod
    def of(cls, request: Request, chunk_size: int) -> Known:
        """As of the request's end."""
        num_full = max(0, count_computed_chunks(request.num_tokens, chunk_size) - 1)
        full = request.chunk_keys[:num_full]
        tail = request.token_ids[len(full) * chunk_size : (num_full + 1) * chunk_size]
        return cls(request.num_tokens, request.tenant, full, tail)


class _Pull(NamedTuple):
    """A chunk that a peer was asked for."""

    transfer: SlowTransfer
    peer_id: int
    since_s: float


class _Ask(NamedTuple):
    """A request that waits for a peer's word. then: see Peer.ask."""

    peer_id: int
    query: ContextQuery
    request: Request
    then: Callable[[float, Sequence[ChunkRecord]], None]


class _Offer(NamedTuple):
    """A conversation, what it is worth, and whom it goes to."""

    value: float
    peer_id: int
    conversation_id: str
    known: Known
    records: Sequence[ChunkRecord]


class Peer:
    """One replica's end of the network."""

    def __init__(self, peer_id: int, replica: Driver, network: Network, now: float) -> None:
        """Made by Network.join. Raises AssertionError if the core has no tier of peers."""
        handover = replica.core.handover
        assert handover is not None, "the core has no tier of peers"
        self.peer_id = peer_id
        self.is_draining = False
        self._replica = replica
        self._handover: Handover = handover
        self._config = replica.core.cache_config
        self._network = network
        spec = network.spec
        rate = min(spec.bytes_per_s, spec.rate_bytes_per_s or spec.bytes_per_s)
        self._out, self._into = Link(rate), Link(rate)
        if spec.rate_bytes_per_s is not None:
            replica.core.note_load_price(PEER, network.bytes_per_block / spec.rate_bytes_per_s, now)
        self._num_asks = 0
        self._asks: dict[int, _Ask] = {}
        self._expected: OrderedDict[bytes, int] = OrderedDict()
        self._pulls: dict[bytes, _Pull] = {}
        self._to_get: dict[int, list[bytes]] = {}
        self._last_pull_s = 0.0
        self._is_watching = False
        self._waiting: dict[bytes, dict[int, None]] = {}  # for a chunk of ours
        self._known: OrderedDict[str, Known] = OrderedDict()  # the last used one last
        self._accepted: dict[str, tuple[int, int]] = {}  # whose offers they are, and which of theirs
        self._num_accepted = 0
        self._offers: Iterator[_Offer] = iter(())
        self._open_offers: dict[int, int] = {}
        self._num_offers = 0
        self._on_offered: Callable[[float], None] = lambda now: None

    # -- for requests --------------------------------------------------------------------------------------------------

    def ask(self, request: Request, now: float, then: Callable[[float, Sequence[ChunkRecord]], None]) -> bool:
        """Ask the peer that knows most of the conversation for what is not here; False = there is nothing to ask for.

        then: is called once with the chunks that were found there, which are to be expected when the request is added. It is
            called with none, too, when either of the two has gone.
        """
        best = self._network.directory.best(request.conversation_id, self.peer_id, now)
        if best is None:
            return False
        peer_id, num_tokens = best
        query = self._handover.missing_chunks(request)
        if query is None or query.first_position * self._config.chunk_size >= num_tokens:
            return False
        self._num_asks += 1
        self._asks[self._num_asks] = _Ask(peer_id, query, request, then)
        self._network.post(now, peer_id, Peer._on_ask, self.peer_id, self._num_asks, query.keys)
        return True

    def _on_ask(self, now: float, asker_id: int, number: int, keys: Sequence[bytes]) -> None:
        found = self._handover.find_chunks(keys, now)
        self._network.post(now, asker_id, Peer._on_found, number, found)

    def _on_found(self, now: float, number: int, found: FoundChunks) -> None:
        ask = self._asks.pop(number, None)
        if ask is None:
            return
        records = records_of(ask.query, found, ask.request, self._config.chunk_size)
        self._expect(ask.peer_id, records)
        ask.then(now, records)

    def note(self, request: Request, now: float) -> None:
        """A turn has ended here."""
        self._remember(request.conversation_id, Known.of(request, self._config.chunk_size), now)

    def _remember(self, conversation_id: str, known: Known, now: float) -> None:
        self._known.pop(conversation_id, None)
        self._known[conversation_id] = known
        if len(self._known) > MAX_OFFERED:
            self._known.popitem(last=False)
        self._network.directory.note(conversation_id, self.peer_id, known.num_tokens, now)

    def _expect(self, peer_id: int, records: Iterable[ChunkRecord]) -> None:
        """Loads of these go to that peer from now on."""
        for record in records:
            self._expected.pop(record.key, None)
            self._expected[record.key] = peer_id
        while len(self._expected) > self._config.tiers[-1].num_blocks:
            self._expected.popitem(last=False)

    # -- transfers of the core -----------------------------------------------------------------------------------------

    def start(self, transfer: SlowTransfer, now: float) -> None:
        """Begin a transfer, of either direction; `tell` has to follow."""
        if transfer.copy.target_tier == PEER:
            self._send(transfer, now)
            return
        peer_id = self._expected.get(transfer.key)
        if peer_id is None or not self._network.has(peer_id):
            self._end_later(now, TransferEnd(transfer.transfer_id, False, gone=True))
            return
        self._pulls[transfer.key] = _Pull(transfer, peer_id, now)
        self._to_get.setdefault(peer_id, []).append(transfer.key)
        if not self._is_watching:
            self._is_watching = True
            self._network.events.add(now + WATCH_INTERVAL_S, ARRIVAL, self._watch, None)

    def tell(self, now: float) -> None:
        """Say to peers what came of the last plan: what is wanted of them, what they do not get, which offers have ended."""
        network = self._network
        to_get, self._to_get = self._to_get, {}
        for peer_id, keys in to_get.items():
            network.post(now, peer_id, Peer._on_get, self.peer_id, keys)
        gone: dict[int, list[bytes]] = {}
        for key in self._handover.take_declined():
            for peer_id in self._waiting.pop(key, ()):
                gone.setdefault(peer_id, []).append(key)
        for peer_id, keys in gone.items():
            network.post(now, peer_id, Peer._on_gone, self.peer_id, keys)
        for offer_id in self._handover.take_ended_offers():
            peer_id, number = self._accepted.pop(offer_id)
            network.post(now, peer_id, Peer._on_offer_end, number)

    def _on_get(self, now: float, asker_id: int, keys: Sequence[bytes]) -> None:
        to_ask = [key for key in keys if key not in self._waiting]
        for key in keys:
            self._waiting.setdefault(key, {})[asker_id] = None
        self._replica.run(lambda: self._handover.start_sends(to_ask, now), now)

    def _send(self, transfer: SlowTransfer, now: float) -> None:
        """To all that wait for it."""
        network = self._network
        receivers = [peer_id for peer_id in self._waiting.pop(transfer.key, ()) if network.has(peer_id)]
        if not receivers:
            self._end_later(now, TransferEnd(transfer.transfer_id, False, gone=True))
            return
        ends_s = now
        for peer_id in receivers:
            begins_s = max(now, self._out.free_at_s)
            ends_s = self._out.send(network.bytes_per_block, now)
            network.post(begins_s, peer_id, Peer._on_block, self.peer_id, transfer.key, ends_s + network.spec.latency_s)
        self._end_later(ends_s, TransferEnd(transfer.transfer_id, True))

    def _on_block(self, now: float, sender_id: int, key: bytes, ends_s: float) -> None:
        """The first byte of a chunk is here; the last one leaves the sender's link so that it could be here then."""
        end_s = self._into.receive(self._network.bytes_per_block, now, ends_s)
        pull = self._pulls.get(key)
        if pull is not None and pull.peer_id == sender_id:
            self._network.events.add(end_s, END_OF_TRANSFER, self._end_pull, pull)

    def _end_pull(self, now: float, pull: _Pull) -> None:
        if self._pulls.get(pull.transfer.key) is not pull or not self._network.has(self.peer_id):
            return
        del self._pulls[pull.transfer.key]
        # Of the tier's time: what arrives beside another chunk counts once.
        seconds = now - max(pull.since_s, self._last_pull_s)
        self._last_pull_s = now
        self._replica.end_transfer(now, TransferEnd(pull.transfer.transfer_id, True, seconds))

    def _on_gone(self, now: float, sender_id: int, keys: Sequence[bytes]) -> None:
        pulls = [self._pulls[key] for key in keys if key in self._pulls]
        self._fail([pull for pull in pulls if pull.peer_id == sender_id], now)

    def _fail(self, pulls: Iterable[_Pull], now: float) -> None:
        for pull in pulls:
            del self._pulls[pull.transfer.key]
            self._replica.end_transfer(now, TransferEnd(pull.transfer.transfer_id, False, gone=True))

    def _watch(self, now: float, _: None) -> None:
        if not self._network.has(self.peer_id):
            return
        self._fail([pull for pull in self._pulls.values() if now - pull.since_s >= MAX_LOAD_S], now)
        self._is_watching = bool(self._pulls)
        if self._is_watching:
            self._network.events.add(now + WATCH_INTERVAL_S, ARRIVAL, self._watch, None)

    def _end_later(self, time_s: float, end: TransferEnd) -> None:
        self._network.events.add(time_s, END_OF_TRANSFER, self._end_own, end)

    def _end_own(self, now: float, end: TransferEnd) -> None:
        if self._network.has(self.peer_id):
            self._replica.end_transfer(now, end)

    # -- before a replica ends -----------------------------------------------------------------------------------------

    def start_drain(self) -> None:
        """From now on, nothing else matters: send as fast as possible, and take no more offers."""
        self.is_draining = True
        self._out.bytes_per_s = self._network.spec.bytes_per_s

    def offer_all(
        self, now: float, next_home: Callable[[str], int | None], on_offered: Callable[[float], None]
    ) -> None:
        """Offer each conversation to its next home, the most valuable one first. Offers of an earlier call are given up.

        next_home: the peer of a conversation; None = there is none. on_offered: is told when all that these want has come.
        """
        offers = list(self._value_conversations(now, next_home))
        offers.sort(key=lambda offer: offer.value, reverse=True)
        self._offers, self._on_offered = iter(offers), on_offered
        self._open_offers = {}
        for offer in islice(self._offers, MAX_OFFERS_AT_ONCE):
            self._offer(offer, now)
        if not offers:
            on_offered(now)

    def _value_conversations(self, now: float, next_home: Callable[[str], int | None]) -> Iterator[_Offer]:
        config, handover = self._config, self._handover
        for conversation_id, known in reversed(self._known.items()):
            peer_id = next_home(conversation_id)
            if peer_id is None:
                continue
            full = tuple(known.full[:MAX_OFFERED_CHUNKS])
            parent_key = full[-1] if full else root_key(config.model, "", known.tenant)
            tails = tail_keys(parent_key, known.tail) if len(full) == len(known.full) else ()
            context = ContextKeys(full, tails, count_computed_chunks(known.num_tokens, config.chunk_size))
            records = handover.records_of(context, conversation_id, now)[::-1]  # the end of a context is worth most
            yield _Offer(handover.value_of(records), peer_id, conversation_id, known, records)

    def _offer(self, offer: _Offer, now: float) -> None:
        self._num_offers += 1
        number = self._num_offers
        self._open_offers[number] = offer.peer_id
        contents = offer.conversation_id, offer.known, offer.records
        self._network.post(now, offer.peer_id, Peer._on_offer, self.peer_id, number, *contents)

    def _on_offer(
        self,
        now: float,
        sender_id: int,
        number: int,
        conversation_id: str,
        known: Known,
        records: Sequence[ChunkRecord],
    ) -> None:
        if self.is_draining:
            self._network.post(now, sender_id, Peer._on_offer_end, number)
            return
        self._num_accepted += 1
        offer_id = f"offer {self._num_accepted}"
        self._accepted[offer_id] = sender_id, number
        self._expect(sender_id, records)
        here = self._known.get(conversation_id)
        if here is None or here.num_tokens < known.num_tokens:
            self._remember(conversation_id, known, now)
        self._replica.run(lambda: self._handover.accept_offer(records, offer_id, now), now)

    def _on_offer_end(self, now: float, number: int) -> None:
        if self._open_offers.pop(number, None) is None:
            return
        following = next((offer for offer in self._offers if self._network.has(offer.peer_id)), None)
        if following is not None:
            self._offer(following, now)
        elif not self._open_offers:
            self._on_offered(now)

    # -- replicas that go ----------------------------------------------------------------------------------------------

    def note_gone(self, peer_id: int, now: float) -> None:
        """Another replica has gone: what was wanted of it does not come."""
        self._fail([pull for pull in self._pulls.values() if pull.peer_id == peer_id], now)
        for number, ask in list(self._asks.items()):
            if ask.peer_id == peer_id:
                del self._asks[number]
                ask.then(now, ())
        for number, receiver_id in list(self._open_offers.items()):
            if receiver_id == peer_id:
                self._on_offer_end(now, number)

    def give_up(self, now: float) -> None:
        """This replica has gone: requests that were about to be added here are to go elsewhere."""
        asks, self._asks = self._asks, {}
        for ask in asks.values():
            ask.then(now, ())
