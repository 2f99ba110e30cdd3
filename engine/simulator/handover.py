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
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from engine.core.cache.handover import Handover
from engine.core.engine_core import EngineCore
from engine.core.handover import MAX_OFFERED, ContextQuery, FoundChunks, records_of
from engine.core.plan import ChunkRecord, SlowTransfer, TransferEnd
from engine.core.request import Request
from engine.core.tier_table import PEER
from engine.simulator.events import ARRIVAL, END_OF_TRANSFER
from engine.simulator.links import Link
from engine.simulator.network import Network
from engine.simulator.offers import Known, Offer, Offers

# As live: when a chunk that does not come is given up, and how often that is looked at; in seconds.
MAX_LOAD_S = 8.0
WATCH_INTERVAL_S = 0.5


class Driver(Protocol):
    """A replica, as its end of the network sees it."""

    core: EngineCore

    def run(self, command: Callable[[], None], now: float) -> None:
        """Let the core do something beside its steps, and then whatever follows from it."""
        ...

    def end_transfer(self, now: float, end: TransferEnd) -> None:
        """A transfer of the core has ended."""
        ...


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


class Peer:
    """One replica's end of the network."""

    def __init__(self, peer_id: int, replica: Driver, network: Network, now: float) -> None:
        """Joins the network. Raises AssertionError if the core has no tier of peers."""
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
        self._waiting: dict[bytes, dict[int, float]] = {}  # for a chunk of ours, since when
        self._known: OrderedDict[str, Known] = OrderedDict()  # the last used one last
        self._accepted: dict[str, tuple[int, int]] = {}  # whose offers they are, and which of theirs
        self._num_accepted = 0
        self._offers = Offers(network, self._handover, self._config, self._post_offer)
        network.join(peer_id, self, now)

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

    def note(self, request: Request, now: float, next_ids: Collection[int] = ()) -> None:
        """A turn has ended here. next_ids: peers that may be asked for the next one: they hear of it at once."""
        self._remember(request.conversation_id, Known.of(request, self._config.chunk_size), now, next_ids)

    def _remember(self, conversation_id: str, known: Known, now: float, next_ids: Collection[int] = ()) -> None:
        self._known.pop(conversation_id, None)
        self._known[conversation_id] = known
        if len(self._known) > MAX_OFFERED:
            self._known.popitem(last=False)
        told_s = now + self._network.spec.latency_s
        self._network.directory.note(conversation_id, self.peer_id, known.num_tokens, now, next_ids, told_s)

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
            self._waiting.setdefault(key, {}).setdefault(asker_id, now)
        self._replica.run(lambda: self._handover.start_sends(to_ask, now), now)

    def _send(self, transfer: SlowTransfer, now: float) -> None:
        """To all that wait for it."""
        network = self._network
        waiting = self._waiting.pop(transfer.key, {})
        receivers = [peer_id for peer_id in waiting if network.has(peer_id)]
        if not receivers:
            self._end_later(now, TransferEnd(transfer.transfer_id, False, gone=True))
            return
        ends_s = now
        for peer_id in receivers:
            begins_s = max(now, self._out.free_at_s)
            ends_s = self._out.send(network.bytes_per_block, now)
            arrives_s, waited_s = ends_s + network.spec.latency_s, now - waiting[peer_id]
            network.post(begins_s, peer_id, Peer._on_block, self.peer_id, transfer.key, arrives_s, waited_s)
        self._end_later(ends_s, TransferEnd(transfer.transfer_id, True))

    def _on_block(self, now: float, sender_id: int, key: bytes, ends_s: float, waited_s: float) -> None:
        """The first byte of a chunk is here; the last one leaves the sender's link so that it could be here then.

        waited_s: until the sender had it where it is sent from.
        """
        end_s = self._into.receive(self._network.bytes_per_block, now, ends_s)
        pull = self._pulls.get(key)
        if pull is not None and pull.peer_id == sender_id:
            # The sender may have been asked by an earlier pull, which was given up.
            begin_s = min(pull.since_s + waited_s, now)
            self._network.events.add(end_s, END_OF_TRANSFER, self._end_pull, (pull, begin_s))

    def _end_pull(self, now: float, what: tuple[_Pull, float]) -> None:
        pull, begin_s = what
        if self._pulls.get(pull.transfer.key) is not pull or not self._network.has(self.peer_id):
            return
        del self._pulls[pull.transfer.key]
        # Of the tier's time: what arrives beside another chunk counts once, and waiting for the source's own copies does not.
        seconds = now - max(begin_s, self._last_pull_s)
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
        """See Offers.make."""
        self._offers.make(now, self._known, next_home, on_offered)

    def _post_offer(self, now: float, number: int, offer: Offer) -> None:
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
        self._offers.end(now, number)

    # -- replicas that go ----------------------------------------------------------------------------------------------

    def note_gone(self, peer_id: int, now: float) -> None:
        """Another replica has gone: what was wanted of it does not come."""
        self._fail([pull for pull in self._pulls.values() if pull.peer_id == peer_id], now)
        for number, ask in list(self._asks.items()):
            if ask.peer_id == peer_id:
                del self._asks[number]
                ask.then(now, ())
        self._offers.note_gone(peer_id, now)

    def give_up(self, now: float) -> None:
        """This replica has gone: requests that were about to be added here are to go elsewhere."""
        asks, self._asks = self._asks, {}
        for ask in asks.values():
            ask.then(now, ())
