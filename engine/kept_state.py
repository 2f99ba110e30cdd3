"""What an engine keeps beside its fast tiers: slow tiers and peers, what conversations have said and the file of that.

Whatever is wrong with it is KV or a text that is not known, and is told by `problems`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from engine.config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.core.executor_protocol import Executor
from engine.core.plan import ChunkRecord
from engine.core.request import Request
from engine.core.tier_table import TierSpec
from engine.executor.group import make_disk_tier
from engine.executor.peers.tier import make_peer_tier
from engine.executor.tiers.disk_tier import TRANSCRIPT_SHARE
from engine.peer_link import PeerLink
from engine.peer_network import PeerNetwork
from engine.step_loop import PeerAnswers, Transport
from engine.text.transcript import ConversationTable, Remembered
from engine.text.transcript_file import TranscriptFile
from engine.transports import Transports

# Memory for what conversations have said, their texts and token ids; about.
MAX_CONVERSATION_BYTES = 1 << 28
# A prompt is tokenised anew if what its conversation has said is not read from the disk within that, in seconds.
RECALL_TIMEOUT_S = 1.0
# How often a drain is looked at, in seconds.
DRAIN_INTERVAL_S = 0.02

Call = Callable[[Callable[[], Any]], Awaitable[Any]]
NextPeers = Callable[[str], Sequence[str]]


def no_peers(_: str) -> Sequence[str]:
    """That may have a conversation's next turn: none is known."""
    return ()


class KeptState:
    """The conversations of one engine, and where their KV lies beside the fast tiers.

    conversations: what they have said.
    disk: the transport of the disk tier; None = the options do not ask for one.
    specs, transport: of all slow tiers; None = there are none.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        number: int,
        network: PeerNetwork | None,
        cut_tokens: Mapping[int, str],
    ) -> None:
        """Opens what there is, and carries out nothing yet.

        number: of this engine among those with one kv_disk_path; restarted with the same one, it finds what it had.
        network: of engines that hand KV over to each other, if this is one of them.
        cut_tokens: see ConversationTable.

        Raises ConfigError.
        """
        self.conversations = ConversationTable(MAX_CONVERSATION_BYTES, cut_tokens, self._keep)
        self.disk = make_disk_tier(config, executor, number)
        self._transcripts: TranscriptFile | None = None
        if self.disk is not None:
            num_bytes = int(config.kv_disk_size * TRANSCRIPT_SHARE * (1 << 30))
            self._transcripts = TranscriptFile(self.disk.folder, num_bytes)
        self._peers = make_peer_tier(config, executor, network)
        self._next_peers: NextPeers = no_peers
        self._link: PeerLink | None = None
        tiers = [tier for tier in (self.disk, self._peers) if tier is not None]
        self.specs: tuple[TierSpec, ...] = tuple(tier.spec for tier in tiers)
        transports: dict[str, Transport] = {tier.spec.name: tier for tier in tiers}
        self.transport = Transports(transports) if transports else None

    def join(
        self, core: EngineCore, put: Callable[[Callable[[], None]], None], adapter_identity: Callable[[str], str]
    ) -> PeerAnswers | None:
        """Take the engine's core; before it steps. Returns what the core's answers to peers go to, if there are peers.

        put: runs a command in the engine thread, between two steps.
        adapter_identity: of a conversation's adapter, by the conversation's name; "" = the model alone.
        """
        if self._peers is None or core.handover is None:
            return None
        self._link = PeerLink(self._peers, core.handover, core.cache_config, self.conversations, put, adapter_identity)
        return self._link

    def run(self, core: EngineCore, put: Callable[[Callable[[], None]], None]) -> None:
        """Serve from the tiers at once; what an earlier process has left there is found meanwhile."""
        disk = self.disk

        def wake() -> None:
            put(lambda: None)

        if disk is not None:
            core.await_records(disk.spec.name)
            if disk.read_s is not None:
                core.note_load_price(disk.spec.name, disk.read_s, time.monotonic())
            disk.run(lambda records: put(lambda: core.restore(disk.spec.name, records, time.monotonic())), wake=wake)
        if self._peers is not None and self._link is not None:
            if self._peers.load_s is not None:
                core.note_load_price(self._peers.spec.name, self._peers.load_s, time.monotonic())
            self._peers.run(self._link, wake)

    # -- conversations -------------------------------------------------------------------------------------------------

    def _keep(self, conversation_id: str, remembered: Remembered) -> None:
        """Note what a conversation has said up to the end of a turn; returns at once."""
        if self._transcripts is not None:
            self._transcripts.put(conversation_id, remembered)
        if self._peers is not None and remembered.branches:
            num_tokens = len(remembered.branches[-1].token_ids)
            self._peers.note_conversation(conversation_id, num_tokens, self._next_peers(conversation_id))

    async def recall(self, conversation_id: str) -> None:
        """Remember what a conversation has said in an earlier process or to another engine, if that is known soon."""
        if self._transcripts is not None and not self.conversations.knows(conversation_id):
            found = asyncio.wrap_future(self._transcripts.find(conversation_id))
            with contextlib.suppress(TimeoutError):
                if remembered := await asyncio.wait_for(found, RECALL_TIMEOUT_S):
                    self.conversations.recall(conversation_id, remembered)
        if self._link is not None:
            await self._link.recall(conversation_id)

    async def chunks_elsewhere(self, request: Request) -> Sequence[ChunkRecord]:
        """What a peer has of the context of a request that is about to be added; see Handover.expect."""
        return () if self._link is None else await self._link.chunks_of(request)

    # -- peers ---------------------------------------------------------------------------------------------------------

    @property
    def peer_address(self) -> tuple[str, int] | None:
        """Where other engines reach this one; None = it hands no KV over."""
        return None if self._peers is None else self._peers.address

    def set_peers(self, peers: Mapping[str, tuple[str, int]], next_peers: NextPeers) -> None:
        """See AsyncEngine.set_peers."""
        self._next_peers = next_peers
        if self._peers is not None:
            self._peers.set_peers(peers)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def hand_over(self, call: Call, timeout_s: float, next_home: Callable[[str], str | None]) -> None:
        """See AsyncEngine.hand_over. call: runs a function in the engine thread."""
        if self._link is not None:
            await self._link.offer_all(next_home, call, time.monotonic() + timeout_s)

    async def drain(
        self, core: EngineCore, call: Call, timeout_s: float, next_home: Callable[[str], str | None] | None
    ) -> None:
        """See AsyncEngine.drain. call: runs a function in the engine thread."""
        deadline_s = time.monotonic() + timeout_s
        await call(lambda: core.start_drain(time.monotonic()))
        offering: asyncio.Task[None] | None = None
        if self._link is not None and next_home is not None:
            self._link.start_drain()
            offering = asyncio.create_task(self._link.offer_all(next_home, call, deadline_s))
        try:
            while time.monotonic() < deadline_s:
                is_drained = await call(lambda: core.is_drained(time.monotonic()))
                if is_drained and (offering is None or offering.done()):
                    break
                await asyncio.sleep(DRAIN_INTERVAL_S)
        finally:
            if offering is not None:
                offering.cancel()
                await asyncio.gather(offering, return_exceptions=True)

    def problems(self) -> dict[str, str]:
        """Why a slow tier cannot be used at present, by its name."""
        tiers = [tier for tier in (self.disk, self._peers) if tier is not None]
        # Each is asked once, as it may change meanwhile.
        return {tier.spec.name: problem for tier in tiers if (problem := tier.problem) is not None}

    def written_bytes(self) -> dict[str, int]:
        """To the files of slow tiers so far, "<tier>_<what>"."""
        if self.disk is None or self._transcripts is None:
            return {}
        name = self.disk.spec.name
        return {
            f"{name}_chunks": self.disk.num_written_bytes,
            f"{name}_transcripts": self._transcripts.num_written_bytes,
        }

    def handover_counts(self) -> dict[str, int]:
        """Of conversations that were told of, or left to, other engines, see PeerLink; empty if there are none."""
        return {} if self._link is None else dict(self._link.counts)

    def close(self) -> None:
        """Write what is left. Blocks; after the end of the engine thread, and before the executor frees the blocks."""
        if self._transcripts is not None:
            self._transcripts.close()  # before another process may have the folder
        if self._peers is not None:
            self._peers.close()
        if self.disk is not None:
            self.disk.close()
