"""What a replica that drains offers to others: each conversation to its next home, the most valuable one first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from engine.core.cache.handover import Handover
from engine.core.cache.index import root_key
from engine.core.cache_map import ContextKeys, count_computed_chunks, tail_keys
from engine.core.config import CacheConfig
from engine.core.handover import MAX_OFFERED_CHUNKS, MAX_OFFERS_AT_ONCE
from engine.core.plan import ChunkRecord
from engine.core.request import Request
from engine.simulator.network import Network


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


class Offer(NamedTuple):
    """A conversation, what it is worth, and the replica that it is offered to."""

    value: float
    peer_id: int
    conversation_id: str
    known: Known
    records: Sequence[ChunkRecord]


class Offers:
    """Those of one replica."""

    def __init__(
        self,
        network: Network,
        handover: Handover,
        config: CacheConfig,
        post: Callable[[float, int, Offer], None],
    ) -> None:
        """post: sends an offer, with a number of its own, to its peer; `end` has to be called with that number."""
        self._network = network
        self._handover = handover
        self._config = config
        self._post = post
        self._waiting: Iterator[Offer] = iter(())
        self._open: dict[int, int] = {}  # the peer of each
        self._num_made = 0
        self._on_offered: Callable[[float], None] = lambda now: None

    def make(
        self,
        now: float,
        known: OrderedDict[str, Known],
        next_home: Callable[[str], int | None],
        on_offered: Callable[[float], None],
    ) -> None:
        """Offer each conversation to its next home. Offers of an earlier call are given up.

        known: by conversation. next_home: the peer of a conversation; None = there is none.
        on_offered: is told when all that these want has come.
        """
        offers = list(self._value(now, known, next_home))
        offers.sort(key=lambda offer: offer.value, reverse=True)
        self._waiting, self._on_offered, self._open = iter(offers), on_offered, {}
        for offer in islice(self._waiting, MAX_OFFERS_AT_ONCE):
            self._make(offer, now)
        if not offers:
            on_offered(now)

    def end(self, now: float, number: int) -> None:
        """A peer has got what it wants of an offer."""
        if self._open.pop(number, None) is None:
            return
        following = next((offer for offer in self._waiting if self._network.has(offer.peer_id)), None)
        if following is not None:
            self._make(following, now)
        elif not self._open:
            self._on_offered(now)

    def note_gone(self, peer_id: int, now: float) -> None:
        """A peer has gone, with what it was offered."""
        for number in [number for number, receiver_id in self._open.items() if receiver_id == peer_id]:
            self.end(now, number)

    def _make(self, offer: Offer, now: float) -> None:
        self._num_made += 1
        self._open[self._num_made] = offer.peer_id
        self._post(now, self._num_made, offer)

    def _value(
        self, now: float, all_known: OrderedDict[str, Known], next_home: Callable[[str], int | None]
    ) -> Iterator[Offer]:
        config, handover = self._config, self._handover
        for conversation_id, known in reversed(all_known.items()):  # the last used one first
            peer_id = next_home(conversation_id)
            if peer_id is None:
                continue
            full = tuple(known.full[:MAX_OFFERED_CHUNKS])
            parent_key = full[-1] if full else root_key(config.model, "", known.tenant)
            tails = tail_keys(parent_key, known.tail) if len(full) == len(known.full) else ()
            context = ContextKeys(full, tails, count_computed_chunks(known.num_tokens, config.chunk_size))
            records = handover.records_of(context, conversation_id, now)[::-1]  # the end of a context is worth most
            yield Offer(handover.value_of(records), peer_id, conversation_id, known, records)
