"""What it costs to compute a chunk again or to load it.

Numbers in, numbers out; profiling that measures them lives elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.core.tier_table import CPU


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost of recomputing one chunk as a line in its context length (paper section 4.3.1, Figure 4), and of loading one.

    All in one unit, whichever: only ratios are compared.

    constant: everything but attention, per chunk.
    per_context_token: attention of one chunk to one token of context.
    chunk_size: tokens a chunk.
    load_costs: of one chunk, by the name of the tier that it comes from, all the way to the tier that computes; a tier
        that is not in it has an unknown cost, and loading from it is always preferred. For slow tiers see LoadPrices.
    is_in_seconds: they were measured here, and their unit is the second.
    """

    constant: float = 1.0
    per_context_token: float = 1.0 / 4096
    chunk_size: int = 32
    load_costs: Mapping[str, float] = field(default_factory=dict)
    is_in_seconds: bool = False

    @property
    def swap_in_cost(self) -> float:
        """Of one chunk that lies in the CPU tier; 0 if it is not known."""
        return self.load_costs.get(CPU, 0.0)

    def chunk_cost(self, position: int) -> float:
        """Cost of chunk number `position`: it attends to everything up to its own end."""
        return self.constant + self.per_context_token * (position + 1) * self.chunk_size

    def is_loaded(self, tier: str, position: int, num_tokens: int) -> bool:
        """Whether to load a chunk from `tier`, of which `num_tokens` are wanted, rather than to compute these again.

        The rule: load a chunk if its own load costs no more than its own computation. What is queued in front of it does
        not count: the loads of a plan go beside its computation, and everything in the step ends with both, whichever way
        this chunk takes. So the total over all chunks is smallest when each takes its cheaper way. Because computing costs
        more from chunk to chunk while loading does not, that is one cut: everything before it is computed, everything from
        it on is loaded.

        The bound: if loading and computing overlap perfectly, a split takes the larger of its two sums and not their total;
        as the larger is at least half of the total, the split with the smallest total takes at most twice as long as the
        best one. (A cut that balances the two sums, as in "Compute or Load KV Cache? Why Not Both?", Jin et al. 2024, would
        be faster for a request alone, but computes again what loads faster, at the cost of all that run beside it.)
        """
        return self.load_costs.get(tier, 0.0) * self.chunk_size <= self.chunk_cost(position) * num_tokens

    @classmethod
    def from_model_shape(
        cls, *, num_parameters: int, num_layers: int, num_heads: int, head_dim: int, chunk_size: int
    ) -> CostModel:
        """Analytic fallback in floating-point operations.

        2 per parameter and token outside attention; 4 per layer, head, feature and pair of tokens inside (QK and PV).
        """
        return cls(
            constant=2.0 * num_parameters * chunk_size,
            per_context_token=4.0 * num_layers * num_heads * head_dim * chunk_size,
            chunk_size=chunk_size,
        )
