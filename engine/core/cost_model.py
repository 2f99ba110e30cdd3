"""What it costs to compute a chunk again. Numbers in, numbers out; profiling that measures them lives elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost of recomputing one chunk as a line in its context length (paper section 4.3.1, Figure 4).

    constant: everything but attention, per chunk. per_context_token: attention of one chunk to one token of context.
    swap_in_cost: to load one chunk from the CPU tier; 0 = unknown, loading is always preferred. All in one unit, any: only
    ratios are compared.
    """

    constant: float = 1.0
    per_context_token: float = 1.0 / 4096
    chunk_size: int = 32
    swap_in_cost: float = 0.0

    def chunk_cost(self, position: int) -> float:
        """Cost of chunk number `position`: it attends to everything up to its own end."""
        return self.constant + self.per_context_token * (position + 1) * self.chunk_size

    @classmethod
    def from_model_shape(
        cls, *, num_parameters: int, num_layers: int, num_heads: int, head_dim: int, chunk_size: int
    ) -> CostModel:
        """Analytic fallback in floating-point operations: 2 per parameter and token outside attention; 4 per layer,
        head, feature and pair of tokens inside (QK and PV)."""
        return cls(
            constant=2.0 * num_parameters * chunk_size,
            per_context_token=4.0 * num_layers * num_heads * head_dim * chunk_size,
            chunk_size=chunk_size,
        )
