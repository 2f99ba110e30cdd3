"""The tiers by name, the fastest first: the one table from which everything else knows them.

The first tier is the one whose blocks a step computes in. The second one exchanges blocks with it inside of plans: a step's
copies between the two are finished when its result is given. Slow tiers lie behind the second one and exchange blocks with
that one alone, outside of plans and for as long as it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ConfigError

# On a machine without a GPU the GPU tier is a pool in host memory.
GPU = "gpu"
CPU = "cpu"
FAST_TIERS = (GPU, CPU)
# Other engines: the slow tier whose blocks are no memory, but places for chunks that are expected from a peer or sent to one.
PEER = "peer"
# Places for chunks that peers are said to have, for each block of the CPU tier, and at least.
PLACES_PER_BLOCK = 4
MIN_PLACES = 1024
# A request waits no longer for peers, in seconds; every load ends before.
MAX_PEER_WAIT_S = 10.0
# What is shown instead of a tier for a chunk that lies in both fast ones, and for one that lies in none.
BOTH = "both"
DROPPED = "dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """Name and size of one tier.

    num_blocks: its size in blocks of one chunk each.
    is_fast: its copies are part of plans, and finished with the step.
    max_wait_s: longest time that a request waits for its loads from a slow tier, in seconds. If a transfer takes longer, the
        tier is left alone until that has ended.
    stores_first_use: chunks are stored there although they were used once only.
    rewrite_s: in so many seconds no more is stored, on average, than the tier holds; 0 = no bound.
    is_store: it keeps what is stored there. False = it is PEER: a chunk has a block there only as long as it is expected, and
        a transfer to it sends the chunk away.
    """

    name: str
    num_blocks: int
    is_fast: bool = True
    max_wait_s: float = 10.0
    stores_first_use: bool = True
    rewrite_s: float = 0.0
    is_store: bool = True


def peer_tier(num_cpu_blocks: int) -> TierSpec:
    """The tier of peers beside a CPU tier of that size."""
    return TierSpec(
        name=PEER,
        num_blocks=max(PLACES_PER_BLOCK * num_cpu_blocks, MIN_PLACES),
        is_fast=False,
        max_wait_s=MAX_PEER_WAIT_S,
        is_store=False,
    )


def tier_row(num_gpu_blocks: int, num_cpu_blocks: int, slow_tiers: Sequence[TierSpec] = ()) -> tuple[TierSpec, ...]:
    """All tiers of a cache, the fastest first.

    Raises ConfigError if a slow tier has a fast one's or another one's name, is not slow, or has no second tier before it.
    """
    fast = tuple(
        TierSpec(name=name, num_blocks=num_blocks)
        for name, num_blocks in zip(FAST_TIERS, (num_gpu_blocks, num_cpu_blocks), strict=True)
    )
    row = (*fast, *slow_tiers)
    if len({tier.name for tier in row}) < len(row):
        raise ConfigError(f"tier names must be unique, got {', '.join(tier.name for tier in row)}", param="slow_tiers")
    for tier in slow_tiers:
        if tier.is_fast:
            raise ConfigError(f"the tier {tier.name} has to be declared with is_fast=False", param="slow_tiers")
    if slow_tiers and not num_cpu_blocks:
        raise ConfigError(
            f"the tier {slow_tiers[0].name} needs a CPU tier, because its blocks pass through it; set num_cpu_blocks or "
            "kv_offloading_size",
            param="slow_tiers",
        )
    return row


def tier_title(name: str) -> str:
    """As it is written for people."""
    return name.upper() if name in FAST_TIERS else name


def transfer_outcome(tier: str, *, is_load: bool, ok: bool, gone: bool) -> str:
    """How a transfer of a slow tier has ended, for the counters.

    gone: it was no fault of the tier: a peer no longer has the chunk, or is no longer there.
    """
    verb, done = ("load", "loaded") if is_load else ("send", "sent") if tier == PEER else ("store", "stored")
    return done if ok else f"{verb}_gone" if gone and tier == PEER else f"{verb}_failed"


def transfer_outcomes(tier: str) -> tuple[str, ...]:
    """All of them, those that went well first."""
    ends = ((True, False), (False, False), *([(False, True)] if tier == PEER else []))
    return tuple(
        transfer_outcome(tier, is_load=is_load, ok=ok, gone=gone) for ok, gone in ends for is_load in (True, False)
    )


def eviction_reasons(tiers: Sequence[str]) -> tuple[str, ...]:
    """What evictions from these tiers do, as "<tier>_<what>"; `tiers` are names, the fastest first.

    reclaimed: a slower tier has the chunk too, so its block was free to take. swapped_out: its block was wanted, and the
    chunk left for the next tier. dropped: its KV is gone. copy_dropped: it lost a copy, and a faster tier still has it.
    """
    return tuple(eviction_moves(tiers))


def eviction_moves(tiers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """From where to where an eviction took the chunk, by reason; see eviction_reasons."""
    moves: dict[str, tuple[str, str]] = {}
    for index, name in enumerate(tiers):
        slower = tiers[min(index + 1, len(tiers) - 1)]
        if index == 0:
            targets = {"reclaimed": slower, "swapped_out": slower, "dropped": DROPPED}
        else:
            targets = {"dropped": DROPPED, "copy_dropped": tiers[index - 1]}
            if slower != name:
                targets["reclaimed"] = slower
        moves |= {f"{name}_{what}": (name, target) for what, target in targets.items()}
    return moves
