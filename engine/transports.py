"""The transports of several slow tiers as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engine.core.plan import SlowTransfer, TransferEnd
from engine.step_loop import Transport


class Transports:
    """Gives each transfer to the transport of its slow tier."""

    def __init__(self, by_tier: Mapping[str, Transport]) -> None:
        """by_tier: by the tier's name."""
        self._by_tier = by_tier

    def start(self, transfer: SlowTransfer) -> None:
        """Begin a transfer; returns at once."""
        copy = transfer.copy
        tier = copy.source_tier if copy.source_tier in self._by_tier else copy.target_tier
        self._by_tier[tier].start(transfer)

    def poll(self) -> Iterable[TransferEnd]:
        """The transfers that have ended since the last call, those of one tier after those of another."""
        return [end for transport in self._by_tier.values() for end in transport.poll()]
