"""What an engine keeps outside of its fast tiers and its memory: slow tiers, and the file of what conversations have said.

Knows no request. Whatever is wrong with it is KV or a text that is not known, and is told by `problems`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from engine.config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.core.executor_protocol import Executor
from engine.core.tier_table import TierSpec
from engine.executor.group import make_disk_tier
from engine.executor.tiers.disk_tier import TRANSCRIPT_SHARE
from engine.peer_network import PeerNetwork
from engine.text.transcript import ConversationTable, Remembered
from engine.text.transcript_file import TranscriptFile
from engine.transports import Transports

# A prompt is tokenised anew if what its conversation has said is not read from the disk within that, in seconds.
RECALL_TIMEOUT_S = 1.0


class KeptState:
    """The slow tiers of one engine.

    disk: the transport of the disk tier; None = the options do not ask for one.
    transport: of all slow tiers; None = there are none.
    """

    def __init__(self, config: EngineConfig, executor: Executor, number: int, network: PeerNetwork | None) -> None:
        """Opens what there is, and carries out nothing yet.

        number: of this engine among those with one kv_disk_path; restarted with the same one, it finds what it had.
        network: of engines that hand KV over to each other, if this is one of them.

        Raises ConfigError.
        """
        self.disk = make_disk_tier(config, executor, number)
        self._transcripts: TranscriptFile | None = None
        if self.disk is not None:
            num_bytes = int(config.kv_disk_size * TRANSCRIPT_SHARE * (1 << 30))
            self._transcripts = TranscriptFile(self.disk.folder, num_bytes)
        tiers = () if self.disk is None else (self.disk,)
        self.specs: tuple[TierSpec, ...] = tuple(tier.spec for tier in tiers)
        self.transport = Transports({tier.spec.name: tier for tier in tiers}) if tiers else None

    def run(self, core: EngineCore, put: Callable[[Callable[[], None]], None]) -> None:
        """Serve from the tiers at once; what an earlier process has left there is found meanwhile.

        put: runs a command in the engine thread, between two steps.
        """
        disk = self.disk
        if disk is None:
            return
        core.await_records(disk.spec.name)
        if disk.read_s is not None:
            core.note_load_price(disk.spec.name, disk.read_s, time.monotonic())
        disk.run(
            lambda records: put(lambda: core.restore(disk.spec.name, records, time.monotonic())),
            wake=lambda: put(lambda: None),
        )

    def keep(self, conversation_id: str, remembered: Remembered) -> None:
        """Note what a conversation has said up to the end of a turn; returns at once."""
        if self._transcripts is not None:
            self._transcripts.put(conversation_id, remembered)

    async def recall(self, conversation_id: str, conversations: ConversationTable) -> None:
        """Remember what a conversation has said in an earlier process, if that is known soon."""
        if self._transcripts is None or conversations.knows(conversation_id):
            return
        found = asyncio.wrap_future(self._transcripts.find(conversation_id))
        with contextlib.suppress(TimeoutError):
            if remembered := await asyncio.wait_for(found, RECALL_TIMEOUT_S):
                conversations.recall(conversation_id, remembered)

    @property
    def peer_address(self) -> tuple[str, int] | None:
        """Where other engines reach this one; None = it hands no KV over."""
        return None

    def set_peers(self, peers: Mapping[str, tuple[str, int]]) -> None:
        """Hear who the other engines are now, by id, and where."""

    def problems(self) -> dict[str, str]:
        """Why a slow tier cannot be used at present, by its name."""
        problem = None if self.disk is None else self.disk.problem
        return {} if self.disk is None or problem is None else {self.disk.spec.name: problem}

    def written_bytes(self) -> dict[str, int]:
        """To the files of slow tiers so far, "<tier>_<what>"."""
        if self.disk is None or self._transcripts is None:
            return {}
        name = self.disk.spec.name
        return {
            f"{name}_chunks": self.disk.num_written_bytes,
            f"{name}_transcripts": self._transcripts.num_written_bytes,
        }

    def close(self) -> None:
        """Write what is left. Blocks; after the end of the engine thread, and before the executor frees the blocks."""
        if self._transcripts is not None:
            self._transcripts.close()  # before another process may have the folder
        if self.disk is not None:
            self.disk.close()
