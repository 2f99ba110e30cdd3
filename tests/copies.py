"""Block copies between the two fast tiers, in short."""

from engine.core.plan import BlockCopy
from engine.core.tier_table import CPU, GPU


def swap_out(source: int, target: int) -> BlockCopy:
    """From the GPU tier to the CPU tier; an eviction, too."""
    return BlockCopy(GPU, source, CPU, target)


def swap_in(source: int, target: int) -> BlockCopy:
    """From the CPU tier to the GPU tier."""
    return BlockCopy(CPU, source, GPU, target)


def local_copy(source: int, target: int) -> BlockCopy:
    """Within the GPU tier."""
    return BlockCopy(GPU, source, GPU, target)
