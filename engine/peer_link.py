"""An engine and its peers: what was said and its KV, fetched when a request needs it, and left to others when an engine ends.

    request comes    recall        what a peer knows more of the conversation, before the prompt is tokenised
                     chunks_of     which chunks that peer has that we lack: expected from then on, loaded at its turn
    engine ends      offer_all     each conversation, with its chunks, to its next home, the most valuable one first
    peers ask        find, send, transcript, offered      (PeerHandlers)

A peer that does not answer soon, or whatever else goes wrong, is a miss.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any, NamedTuple

from engine.core.cache.handover import Handover
from engine.core.cache_map import context_keys
from engine.core.config import CacheConfig
from engine.core.handover import MAX_OFFERED, MAX_OFFERED_CHUNKS, MAX_OFFERS_AT_ONCE, FoundChunks, records_of
from engine.core.plan import ChunkRecord
from engine.core.request import Request
from engine.executor.peers.tier import PeerTier
from engine.text.transcript import Conversation, ConversationTable
from engine.text.transcript_file import decode, encode

# A request waits no longer for what a peer knows, and again for what it has; in seconds.
ASK_TIMEOUT_S = 0.25

Call = Callable[[Callable[[], Any]], Awaitable[Any]]


class _Offer(NamedTuple):
    """A conversation that is worth so much, the transcript and the chunks; and who gets it."""

    value: float
    peer_id: str
    conversation: Conversation
    records: Sequence[ChunkRecord]


class PeerLink:
    """The conversation-level half of hand-over; the chunks are moved by the core's transfers.

    counts: conversations that a peer told more of (recalled); that were offered to their next homes (offered), and of these
        the ones that these took (handed_over); and that peers left here (received). Each is counted in one thread.
    """

    def __init__(
        self,
        tier: PeerTier,
        handover: Handover,
        config: CacheConfig,
        conversations: ConversationTable,
        put: Callable[[Callable[[], None]], None],
        adapter_identity: Callable[[str], str] = lambda _: "",
    ) -> None:
        """Nothing is asked yet.

        put: runs a command in the engine thread, between two steps.
        adapter_identity: of a conversation's adapter, by the conversation's name; "" = the model alone.
        """
        self._adapter_identity = adapter_identity
        self._tier = tier
        self._handover = handover
        self._config = config
        self._conversations = conversations
        self._put = put
        self._offer_ids = count(1)
        self._open_offers: dict[str, Future[bool]] = {}
        self.counts = dict.fromkeys(("recalled", "offered", "handed_over", "received"), 0)

    # -- for requests --------------------------------------------------------------------------------------------------

    async def recall(self, conversation_id: str) -> None:
        """Remember what a conversation has said, if a peer knows more of it and tells that soon."""
        best = next(iter(self._tier.best_peers(conversation_id)), None)
        if best is None or best.num_tokens <= self._conversations.count_tokens(conversation_id):
            return
        content = await asyncio.wrap_future(self._tier.fetch_transcript(best.peer_id, conversation_id, ASK_TIMEOUT_S))
        remembered = None if content is None else await asyncio.to_thread(decode, conversation_id, content)
        if remembered is not None:
            self._conversations.recall(conversation_id, remembered)
            self.counts["recalled"] += 1

    async def chunks_of(self, request: Request) -> list[ChunkRecord]:
        """The chunks of a request's context that only a peer has, if it says so soon; to be expected once it is added."""
        best = next(iter(self._tier.best_peers(request.conversation_id)), None)
        if best is None:
            return []
        query = await asyncio.to_thread(self._handover.missing_chunks, request)
        size = self._config.chunk_size
        if query is None or query.first_position * size >= best.num_tokens:
            return []
        found = await asyncio.wrap_future(self._tier.ask(best.peer_id, query.keys, ASK_TIMEOUT_S))
        if found is None:
            return []
        records = records_of(query, found, request, size)
        self._tier.expect(best.peer_id, [record.key for record in records])
        return records

    # -- for peers: in their threads -----------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> FoundChunks:
        """See PeerHandlers."""
        return self._handover.find_chunks(keys, time.monotonic())

    def send(self, keys: Sequence[bytes]) -> None:
        """See PeerHandlers."""
        self._put(lambda: self._handover.start_sends(keys, time.monotonic()))

    def transcript(self, conversation_id: str) -> Future[bytes | None]:
        """See PeerHandlers."""
        conversation = self._conversations.find(conversation_id)
        found: Future[bytes | None] = Future()
        found.set_result(None if conversation is None else encode(conversation_id, conversation.remembered))
        return found

    def offered(
        self, conversation_id: str, records: Sequence[ChunkRecord], transcript: bytes, peer_id: str
    ) -> Future[bool]:
        """See PeerHandlers."""
        taken: Future[bool] = Future()
        remembered = decode(conversation_id, transcript)
        if remembered is None or self._tier.draining:
            taken.set_result(False)
            return taken
        offer_id = f"offer {next(self._offer_ids)}"
        self._open_offers[offer_id] = taken
        self._tier.expect(peer_id, [record.key for record in records])

        def take() -> None:
            self._conversations.adopt(conversation_id, remembered)
            self._handover.accept_offer(records, offer_id, time.monotonic())
            self.counts["received"] += 1

        self._put(take)
        return taken

    # -- what the core has done for peers: in the engine thread ---------------------------------------------------------

    def decline(self, keys: Iterable[bytes]) -> None:
        """See PeerAnswers."""
        self._tier.decline(keys)

    def end_offers(self, offer_ids: Iterable[str]) -> None:
        """See PeerAnswers."""
        for offer_id in offer_ids:
            taken = self._open_offers.pop(offer_id)
            if taken.set_running_or_notify_cancel():
                taken.set_result(True)

    # -- before the engine ends ----------------------------------------------------------------------------------------

    def start_drain(self) -> None:
        """From now on, nothing else matters: send as fast as possible, and take no more offers."""
        self._tier.draining = True

    async def offer_all(self, next_home: Callable[[str], str | None], call: Call, deadline_s: float) -> None:
        """Offer each conversation to its next home; ends when all that these want has been sent.

        call: runs a function in the engine thread. deadline_s: no offer waits for longer, by the monotonic clock.
        """
        offers = await self._value_conversations(next_home, call)
        offers.sort(key=lambda offer: offer.value, reverse=True)
        waiting = iter(offers)

        async def make_offers() -> None:
            for offer in waiting:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return
                conversation_id = offer.conversation.conversation_id
                transcript = await asyncio.to_thread(encode, conversation_id, offer.conversation.remembered)
                self.counts["offered"] += 1
                taken = await asyncio.wrap_future(
                    self._tier.offer(offer.peer_id, conversation_id, offer.records, transcript, left_s)
                )
                self.counts["handed_over"] += taken

        await asyncio.gather(*(make_offers() for _ in range(MAX_OFFERS_AT_ONCE)))

    async def _value_conversations(self, next_home: Callable[[str], str | None], call: Call) -> list[_Offer]:
        config, handover, offers = self._config, self._handover, []
        latest = await call(lambda: list(self._conversations.latest(MAX_OFFERED)))
        for conversation_id, branch in latest:
            peer_id, conversation = next_home(conversation_id), self._conversations.find(conversation_id)
            if peer_id is None or conversation is None:
                continue
            keys = await asyncio.to_thread(
                context_keys,
                branch.token_ids,
                model=config.model,
                tenant=conversation_id.partition("\n")[0],
                adapter=self._adapter_identity(conversation_id),
                chunk_size=config.chunk_size,
                max_chunks=MAX_OFFERED_CHUNKS,
            )
            now = time.monotonic()
            # The end of a context is worth most.
            records = handover.records_of(keys, conversation_id, now)[::-1]
            offers.append(_Offer(handover.value_of(records), peer_id, conversation, records))
        return offers
