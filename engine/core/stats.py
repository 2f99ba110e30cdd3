"""Counters of the engine since its start, and the account of one request.

Token counts, not request counts: a hit rate over requests says nothing about work saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any

from engine.core.phases import RequestPhases
from engine.core.tier_table import FAST_TIERS, PEER, eviction_reasons, transfer_outcomes


@dataclass(slots=True)
class EngineStats:
    """Monotonic counters.

    tiers: names of all tiers, the fastest first.

    Prompt tokens are told apart by where they were on arrival: cached_tokens, by the tier that they were used in or loaded
    from; num_not_loaded_tokens, in a slower tier, but computing them is cheaper; num_dropped_tokens, in full chunks whose KV
    was here and is gone, as far as ChunkIndex remembers; num_new_tokens.
    num_resumed_tokens: left to compute when preempted requests came back, and of answers that were begun elsewhere.
    num_gave_way: of the suspensions, those for another tenant's turn and not for want of blocks to go on.
    num_refused: too many were waiting. num_refused_hints: because none are taken.
    num_local_copies, num_swap_ins, num_swap_outs: in blocks. num_corrupted_swaps: found by `verify_swaps`.
    swap_in_seconds, swap_out_seconds: of the copies' own time, on the first rank.
    num_used_drafts, num_discarded_drafts: plans prepared while a step runs, used or overtaken by something unforeseen.
    num_guessed_tokens: that steps have verified, see speculation.py. num_accepted_tokens: of these, those that came true.
    num_steps_ahead: given to the executor before the step in front had a result.
    evictions: by reason, see tier_table.eviction_reasons.
    slow_transfers: "<tier>_<outcome>" of slow tiers, see tier_table.transfer_outcomes.
    slow_refusals: chunks that were not loaded or stored because computing them again is cheaper, "<tier>_load" and
        "<tier>_store"; and "peer_send", those that a peer asked for and that are not here, or not to be had soon.
    slow_seconds: of the tier's time, by the outcomes that are good, as far as it was measured.
    """

    tiers: InitVar[Sequence[str]] = FAST_TIERS
    num_steps: int = 0
    num_requests: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_refused: int = 0
    num_refused_hints: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    cached_tokens: dict[str, int] = field(init=False)
    num_not_loaded_tokens: int = 0
    num_dropped_tokens: int = 0
    num_new_tokens: int = 0
    num_resumed_tokens: int = 0
    num_computed_tokens: int = 0
    num_suspensions: int = 0
    num_gave_way: int = 0
    num_local_copies: int = 0
    num_swap_ins: int = 0
    num_swap_outs: int = 0
    num_corrupted_swaps: int = 0
    swap_in_seconds: float = 0.0
    swap_out_seconds: float = 0.0
    num_used_drafts: int = 0
    num_discarded_drafts: int = 0
    num_steps_ahead: int = 0
    num_guessed_tokens: int = 0
    num_accepted_tokens: int = 0
    evictions: dict[str, int] = field(init=False)
    slow_transfers: dict[str, int] = field(init=False)
    slow_refusals: dict[str, int] = field(init=False)
    slow_seconds: dict[str, float] = field(init=False)

    def __post_init__(self, tiers: Sequence[str]) -> None:
        self.cached_tokens = dict.fromkeys(tiers, 0)
        self.evictions = dict.fromkeys(eviction_reasons(tiers), 0)
        slow = tiers[len(FAST_TIERS) :]
        self.slow_transfers = {f"{tier}_{outcome}": 0 for tier in slow for outcome in transfer_outcomes(tier)}
        self.slow_refusals = {
            f"{tier}_{what}": 0 for tier in slow for what in ("load", "send" if tier == PEER else "store")
        }
        self.slow_seconds = {f"{tier}_{outcome}": 0.0 for tier in slow for outcome in transfer_outcomes(tier)[:2]}

    def note_cached(self, num_tokens: int, loaded_tokens: Mapping[str, int]) -> dict[str, int]:
        """So many prompt tokens were cached; of these, so many were loaded from other tiers than the first one.

        Returns all of them by tier, the fastest first, without tiers that had none.
        """
        first = next(iter(self.cached_tokens))
        by_tier = {first: num_tokens - sum(loaded_tokens.values()), **loaded_tokens}
        for tier, num in by_tier.items():
            self.cached_tokens[tier] += num
        return {tier: by_tier[tier] for tier in self.cached_tokens if by_tier.get(tier)}

    def as_dict(self) -> dict[str, Any]:
        """The counters by name, with those of a tier under names of their own: num_<tier>_cached_tokens."""
        counters = asdict(self)
        for tier, num_tokens in counters.pop("cached_tokens").items():
            counters[f"num_{tier}_cached_tokens"] = num_tokens
        first = next(iter(self.cached_tokens))
        counters[f"num_{first}_copies"] = counters.pop("num_local_copies")
        if not self.slow_transfers:
            for name in ("slow_transfers", "slow_refusals", "slow_seconds"):
                del counters[name]
        return counters


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """The account of one finished request; times in seconds of the driver's clock.

    Prompt tokens by where they were on arrival, as in EngineStats: num_cached_tokens, in any tier and used;
    num_loaded_tokens, of these the ones that came from a slower tier; cached_by_tier, all of them by tier, without tiers that
    had none.
    num_computed_tokens: all, those after suspensions too. num_written_tokens: newly kept for later requests.
    phases: where the time from arrival_s to finished_s went.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_loaded_tokens: int
    num_not_loaded_tokens: int
    num_dropped_tokens: int
    num_new_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    num_suspensions: int
    num_written_tokens: int = 0
    cached_by_tier: Mapping[str, int] = field(default_factory=dict)
    arrival_s: float
    first_token_s: float | None
    finished_s: float
    phases: RequestPhases
