"""A third tier: a plain dict of contents behind a delay. What it is asked for ends late, out of order, badly, or not at all.

It is added in four places: a TierSpec in CacheConfig.slow_tiers; if it has a price, CostModel.load_costs; an object with
`start` and `poll`, given to the StepLoop; and what reads and writes blocks of the CPU tier for that.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from engine.core.plan import SlowTransfer, TransferEnd
from engine.core.tier_table import CPU, TierSpec

NAME = "dict"


def dict_tier(num_blocks: int, max_wait_s: float = 30.0) -> TierSpec:
    return TierSpec(name=NAME, num_blocks=num_blocks, is_fast=False, max_wait_s=max_wait_s)


class DelayedTier:
    """Carries out the transfers of one slow tier.

    As long as a load is under way its target holds garbage, and nothing else may write to it; nor to the source of a store.
    """

    def __init__(
        self,
        read: Callable[[int], bytes | None],
        write: Callable[[int, bytes | None], None],
        *,
        seed: int = 0,
        max_delay: int = 6,
        failures: float = 0.05,
        hangs: float = 0.02,
    ) -> None:
        """The ways in which transfers end are drawn with `seed`.

        read: the content of a block of the CPU tier; None if it is known to be corrupted.
        write: the other way; None = garbage.
        max_delay: most polls until a transfer ends.
        failures: part of the transfers that fail; of loads, because the content is lost.
        hangs: part of the transfers that do not end until `wake`.
        """
        self._read, self._write = read, write
        self._rng = random.Random(seed)
        self._max_delay, self._failures, self._hangs = max_delay, failures, hangs
        self._contents: dict[int, tuple[bytes, bytes]] = {}  # block -> the chunk's name, and its content
        self._open: dict[int, tuple[float, SlowTransfer, bytes | None]] = {}  # when it ends; content when it began
        self._num_polls = 0

    @property
    def num_open(self) -> int:
        return len(self._open)

    def start(self, transfer: SlowTransfer) -> None:
        """Begin a transfer."""
        source, target = transfer.copy.source, transfer.copy.target
        assert {transfer.copy.source_tier, transfer.copy.target_tier} == {CPU, NAME}
        assert transfer.transfer_id not in self._open
        delay = float("inf") if self._rng.random() < self._hangs else self._rng.randint(0, self._max_delay)
        if transfer.copy.target_tier == CPU:
            self._write(target, None)
            before = self._read(target)
        else:
            before = self._read(source)
            self._contents.pop(target, None)
        self._open[transfer.transfer_id] = (self._num_polls + delay, transfer, before)

    def poll(self) -> list[TransferEnd]:
        """The transfers that have ended, in any order."""
        self._num_polls += 1
        ended = [transfer_id for transfer_id, (due, _, _) in self._open.items() if due <= self._num_polls]
        self._rng.shuffle(ended)
        return [TransferEnd(transfer_id, self._end(*self._open.pop(transfer_id)[1:])) for transfer_id in ended]

    def wake(self) -> None:
        """Let all transfers end with the next poll."""
        self._open = {key: (0.0, transfer, before) for key, (_, transfer, before) in self._open.items()}

    def _end(self, transfer: SlowTransfer, before: bytes | None) -> bool:
        source, target = transfer.copy.source, transfer.copy.target
        fails = self._rng.random() < self._failures
        if transfer.copy.target_tier == CPU:
            assert self._read(target) in (None, before), "something else was written to the target of a load"
            key, content = self._contents[source]
            assert key == transfer.key, "another chunk lies in that block"
            if fails:
                del self._contents[source]
            else:
                self._write(target, content)
            return not fails
        content = self._read(source)
        if content is None or before is None or fails:
            return False
        assert content == before, "the source of a store has changed"
        self._contents[target] = (transfer.key, content)
        return True
