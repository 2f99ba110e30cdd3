"""The tier of peers: brings chunks from other engines of the same model to the CPU tier, and sends them ours.

Its blocks hold nothing: they stand for chunks that a peer said it has. To load one is to ask that peer for it. Whatever goes
wrong with a peer or on the way is a miss, and nothing else. A chunk travels from a block of the source's CPU tier to one of
ours, without a copy in between.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from engine.config import EngineConfig
from engine.core.executor_protocol import Executor
from engine.core.handover import FoundChunks
from engine.core.plan import ChunkRecord, SlowTransfer, TransferEnd
from engine.core.tier_table import CPU, peer_tier
from engine.errors import ConfigError
from engine.executor.group import GroupExecutor
from engine.executor.local import LocalExecutor
from engine.executor.peers.blocks import Blocks, make_rank_blocks
from engine.executor.peers.client import Peer, query_of
from engine.executor.peers.connection import Connection
from engine.executor.peers.directory import Directory, hash_conversation
from engine.executor.peers.lanes import Query
from engine.executor.peers.loads import Loads
from engine.executor.peers.messages import DirectoryRow, Offer, pack_id, pack_offer, unpack_found
from engine.executor.peers.protocol import MAX_CONTENT_BYTES, MAX_KEYS, VERSION, Greeting, Kind, pack_keys
from engine.executor.peers.sends import Sends
from engine.executor.peers.server import PeerHandlers, PeerServer
from engine.executor.peers.timing import Deadlines, Rate
from engine.executor.tiers.kv_content import kv_identity
from engine.peer_network import PeerNetwork

logger = logging.getLogger(__name__)
T = TypeVar("T")

REFRESH_INTERVAL_S = 2.0
CLOSE_TIMEOUT_S = 5.0
OFFER_TIMEOUT_S = 60.0
# In MB/s, if no other rate is set: on a CPU, answers are computed by the same cores.
CPU_RATE = 200.0


class PeerRow(NamedTuple):
    """A peer that knows a conversation: how many tokens of it, and how long ago its last turn was, in seconds."""

    peer_id: str
    num_tokens: int
    age_s: float


class PeerTier:
    """Carries out the transfers of the tier of peers, and asks them what they have. Any thread may call it.

    spec: of the tier, for the core.
    address: at which it listens, once peers may connect; None if that is not possible.
    problem: why it does not listen, for people; None = all is well.
    load_s: seconds that a block takes at the allowed rate, until one was observed; None = there is no bound.
    """

    def __init__(
        self,
        identity: bytes,
        secret: bytes,
        peer_id: str,
        host: str,
        rate: float,
        blocks: Blocks,
    ) -> None:
        """Take a port.

        identity: of all that the content of a block depends on. secret: of all peers.
        peer_id: our name among them. host: the address of this machine to listen at.
        rate: in MB/s, for what is received, and for what is sent; 0 = no bound.
        blocks: of the CPU tier.
        """
        self.spec = peer_tier(blocks.num_blocks)
        self.problem: str | None = None
        self.load_s = blocks.num_bytes / (rate * 1e6) if rate else None
        self._secret = secret
        self._wake: Callable[[], None] = lambda: None
        self._ended: deque[TransferEnd] = deque()
        self._deadlines = Deadlines("peer-deadlines")
        self._loads = Loads(blocks, Rate(rate * 1e6), self._note_end)
        self._sends = Sends(blocks, Rate(rate * 1e6), self._note_end, self._deadlines)
        self._directory = Directory()
        self._greeting = Greeting(peer_id, os.urandom(16).hex(), identity.hex(), blocks.num_bytes, blocks.chunk_size)
        self._peers: dict[str, Peer] = {}
        self._removed: set[Peer] = set()
        self._expected: OrderedDict[bytes, str] = OrderedDict()
        self._mutex = threading.Lock()
        self._is_closing = False
        self._server: PeerServer | None = None
        try:
            self._server = PeerServer(secret, self._greeting, host, self._sends, self._directory, self._note_told)
        except OSError as error:
            self.problem = f"it cannot listen at {host}: {error}"
            logger.warning("peers get no KV from here: %s", self.problem)

    @property
    def address(self) -> tuple[str, int] | None:
        return None if self._server is None else self._server.address

    @property
    def draining(self) -> bool:
        """Whether this engine ends: it sends as fast as it can, and takes no conversation any more."""
        return not self._sends.is_limited

    @draining.setter
    def draining(self, value: bool) -> None:
        self._sends.is_limited = not value
        if self._server is not None:
            self._server.is_draining = value

    def run(self, handlers: PeerHandlers, wake: Callable[[], None] = lambda: None) -> None:
        """Begin to serve peers; called once. wake: called in a thread when a transfer has ended."""
        self._wake = wake
        if self._server is not None:
            self._server.run(handlers)
        self._deadlines.call_after(REFRESH_INTERVAL_S, self._refresh)

    def close(self) -> None:
        """End all connections and threads; the blocks of the CPU tier are free afterwards. May be called again."""
        with self._mutex:
            self._is_closing = True
            connections: list[Connection] = []
            for peer in (*self._peers.values(), *self._removed):
                connections += peer.close()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        has_ended = self._deadlines.close(CLOSE_TIMEOUT_S)
        if self._server is not None:
            has_ended &= self._server.close(deadline_s)
        for connection in connections:
            has_ended &= connection.join(max(0.0, deadline_s - time.monotonic()))
        if not has_ended:
            logger.error("a connection to a peer does not end; it is left behind")

    # -- transfers -----------------------------------------------------------------------------------------------------

    def start(self, transfer: SlowTransfer) -> None:
        """Begin a transfer, of either direction; returns at once."""
        if transfer.copy.target_tier != CPU:
            self._sends.start(transfer)
            return
        with self._mutex:
            peer = self._peers.get(self._expected.get(transfer.key, ""))
        if peer is None:
            self._loads.fail(transfer, gone=True)
        else:
            peer.pull(transfer)

    def poll(self) -> list[TransferEnd]:
        """The transfers that have ended since the last call."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def decline(self, keys: Iterable[bytes]) -> None:
        """These chunks, which peers want, are not here."""
        self._sends.decline(keys)

    def expect(self, peer_id: str, keys: Iterable[bytes]) -> None:
        """Loads of these chunks go to that peer from now on."""
        with self._mutex:
            for key in keys:
                self._expected.pop(key, None)
                self._expected[key] = peer_id
            while len(self._expected) > self.spec.num_blocks:
                self._expected.popitem(last=False)

    def _note_end(self, end: TransferEnd) -> None:
        self._ended.append(end)
        self._wake()

    # -- peers ---------------------------------------------------------------------------------------------------------

    def set_peers(self, peers: Mapping[str, tuple[str, int]]) -> None:
        """All that are there now, by name, with their addresses. One that has gone is used while its connection lasts."""
        with self._mutex:
            if self._is_closing:
                return
            for peer_id, address in peers.items():
                if peer_id == self._greeting.peer_id:
                    continue
                known = self._peers.get(peer_id)
                if known is not None and known.address == tuple(address):
                    continue
                if known is not None:
                    known.close()
                    self._removed.add(known)
                self._peers[peer_id] = self._meet(peer_id, (address[0], address[1]))
            for peer_id, peer in self._peers.items():
                peer.is_listed = peer_id in peers

    def _meet(self, peer_id: str, address: tuple[str, int]) -> Peer:
        peer = Peer(peer_id, address, self._secret, self._greeting, self._loads, self._deadlines)
        peer.refresh()
        return peer

    def _refresh(self) -> None:
        with self._mutex:
            for peer_id, peer in list(self._peers.items()):
                if not peer.is_listed and not peer.is_connected():
                    del self._peers[peer_id]
            self._removed = {peer for peer in self._removed if peer.is_connected()}
            peers = list(self._peers.values())
        for peer in peers:
            peer.refresh()
        self._deadlines.call_after(REFRESH_INTERVAL_S, self._refresh)

    def best_peers(self, conversation_id: str) -> list[PeerRow]:
        """Those that know the conversation and are not left alone at present; the one that knows most of it first."""
        hashed, now = hash_conversation(conversation_id, self._secret), time.monotonic()
        with self._mutex:
            peers = [peer for peer in self._peers.values() if not peer.is_aside()]
        found = ((peer.peer_id, peer.rows.find(hashed, now)) for peer in peers)
        rows = [PeerRow(peer_id, row.num_tokens, row.age_s) for peer_id, row in found if row is not None]
        return sorted(rows, key=lambda row: (-row.num_tokens, row.age_s))

    def note_conversation(self, conversation_id: str, num_tokens: int, next_peers: Iterable[str] = ()) -> None:
        """Tell peers that so many tokens of a conversation are here, when they ask next; 0 = none any more.

        next_peers: that may have its next turn: they are told at once.
        """
        hashed = hash_conversation(conversation_id, self._secret)
        version = self._directory.note(hashed, num_tokens, time.monotonic())
        with self._mutex:
            peers = [self._peers[peer_id] for peer_id in next_peers if peer_id in self._peers]
        for peer in peers:
            peer.tell(version, DirectoryRow(hashed, num_tokens, 0.0))

    def _note_told(self, theirs: Greeting, version: int, row: DirectoryRow) -> None:
        with self._mutex:
            peer = self._peers.get(theirs.peer_id)
        if peer is not None:
            peer.hear(theirs.incarnation, version, row)

    # -- queries: each future ends in the time given, and may be cancelled ------------------------------------------------

    def ask(self, peer_id: str, keys: Sequence[bytes], timeout_s: float) -> Future[FoundChunks | None]:
        """Which of these chunks a peer has; None if it does not say, or is left alone at present."""
        keys = keys[:MAX_KEYS]
        num_keys = len(keys)
        query = query_of(Kind.FIND, pack_keys(keys), lambda answer: unpack_found(answer, num_keys), None)
        return self._ask(peer_id, query, timeout_s)

    def fetch_transcript(self, peer_id: str, conversation_id: str, timeout_s: float) -> Future[bytes | None]:
        """What a conversation has said, from a peer; None if that does not know, or does not answer."""
        name = pack_id(conversation_id)
        query = query_of(Kind.TRANSCRIPT, name or b"", lambda answer: answer, None)
        return self._ask(peer_id if name is not None else "", query, timeout_s)

    def offer(
        self,
        peer_id: str,
        conversation_id: str,
        records: Sequence[ChunkRecord],
        transcript: bytes,
        timeout_s: float = OFFER_TIMEOUT_S,
    ) -> Future[bool]:
        """Leave a conversation to a peer, which takes its chunks from here, in this order.

        Ends when it has taken all that it wants; with False if it wants nothing, or does not answer in that time.
        """
        content = pack_offer(Offer(conversation_id, tuple(records), transcript))
        is_possible = content is not None and len(content) <= MAX_CONTENT_BYTES
        query = query_of(Kind.OFFER, content or b"", lambda _: True, False, is_patient=True)
        return self._ask(peer_id if is_possible else "", query, timeout_s)

    def _ask(self, peer_id: str, query: Query[T], timeout_s: float) -> Future[T]:
        with self._mutex:
            peer = self._peers.get(peer_id)
        if peer is not None:
            return peer.ask(query, timeout_s)
        query.end(None)
        return query.future


def make_peer_tier(config: EngineConfig, executor: Executor, network: PeerNetwork | None) -> PeerTier | None:
    """The tier of peers, if the options allow it and this engine is to have peers; called once.

    Raises ConfigError if the options demand it, and there is no CPU tier.
    """
    local = executor.local if isinstance(executor, GroupExecutor) else executor
    if not config.may_hand_over or not isinstance(local, LocalExecutor):
        return None
    if not local.num_cpu_blocks:
        if config.kv_handover == "on":
            raise ConfigError(
                "kv_handover needs a CPU tier, because KV passes through it; set kv_offloading_size or num_cpu_blocks",
                param="kv_handover",
            )
        return None
    if network is None:
        return None
    rate = config.kv_transfer_rate
    if rate is None:
        rate = 0.0 if local.loaded.device.type == "cuda" else CPU_RATE
    return PeerTier(
        kv_identity(config, local, VERSION),
        network.secret,
        network.peer_id,
        network.host,
        rate,
        executor.make_blocks() if isinstance(executor, GroupExecutor) else make_rank_blocks(local),
    )
