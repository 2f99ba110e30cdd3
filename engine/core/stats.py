"""Counters of the engine since its start, and the account of one request. Token counts, not request counts: a hit rate
over requests says nothing about work saved.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# What an eviction did. reclaimed: the GPU block of a chunk in both tiers was taken; swapped_out: a chunk left the GPU tier
# for the CPU tier when its block was wanted; dropped: its KV is gone; cpu_copy_dropped: it lost its copy, but is on the GPU.
EVICTION_REASONS = ("gpu_reclaimed", "gpu_swapped_out", "gpu_dropped", "cpu_dropped", "cpu_copy_dropped")


@dataclass(slots=True)
class EngineStats:
    """Monotonic counters. Prompt tokens are told apart by where they were on arrival: cached in the GPU tier; in the CPU tier
    and loaded; in the CPU tier but not loaded, because computing them is cheaper; dropped (in full chunks whose KV was here
    and is gone, as far as cache_manager.MAX_DROPPED_KEYS reaches back); or new. `num_resumed_tokens`: left to compute when
    suspended requests came back, and of answers that were begun elsewhere. `num_gave_way`: of the suspensions, those for
    another tenant's turn and not for want of blocks to go on. `num_refused`: too many were waiting. Swaps and
    copies are counted in blocks; `num_corrupted_swaps` by `verify_swaps`. Drafts are plans prepared while a step runs: used,
    or discarded because something unforeseen happened; `num_steps_ahead` were given to the executor before the step in front
    had a result."""

    num_steps: int = 0
    num_requests: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_refused: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_gpu_cached_tokens: int = 0
    num_cpu_cached_tokens: int = 0
    num_not_loaded_tokens: int = 0
    num_dropped_tokens: int = 0
    num_new_tokens: int = 0
    num_resumed_tokens: int = 0
    num_computed_tokens: int = 0
    num_suspensions: int = 0
    num_gave_way: int = 0
    num_gpu_copies: int = 0
    num_swap_ins: int = 0
    num_swap_outs: int = 0
    num_corrupted_swaps: int = 0
    num_used_drafts: int = 0
    num_discarded_drafts: int = 0
    num_steps_ahead: int = 0
    evictions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EVICTION_REASONS, 0))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RequestStats:
    """The account of one finished request. Prompt tokens by where they were on arrival, as in EngineStats; cached = in either
    tier. num_computed_tokens counts all, those after suspensions too. Times in seconds of the driver's clock."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_cpu_cached_tokens: int
    num_not_loaded_tokens: int
    num_dropped_tokens: int
    num_new_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    num_suspensions: int
    arrival_s: float
    first_token_s: float | None
    finished_s: float
