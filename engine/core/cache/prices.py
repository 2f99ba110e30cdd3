"""What it costs to load a chunk from a slow tier, compared with computing it again, as far as it is known by now.

A cost model is frozen, because eviction relies on it; what is observed while serving is here.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.core.cache.cost_model import CostModel
from engine.core.plan import QuerySegment

# Weight of a new observation against all earlier ones; the first ones count the same.
LOAD_WEIGHT = 1 / 16
STEP_WEIGHT = 1 / 4
# After so many seconds without a load that was observed, one is made only to see what it costs now.
PROBE_AFTER_S = 30.0
# What a load costs beside the tier's time: it begins a step late, stores delay it, and a request waits for its last chunk.
# Without it, a tier that loads about as fast as the model computes was slower than none (benchmarks/tiers.py).
LOAD_OVERHEAD = 4 / 3


class LoadPrices:
    """Prices of slow tiers, in the cost model's units; of a tier without a known price, loading is always preferred.

    The cost model's own price of a tier holds until the first load of it is observed. Comparing seconds with a model in other
    units takes one observed step that computes a prompt.
    """

    def __init__(self, cost_model: CostModel) -> None:
        self._cost_model = cost_model
        self._unit_s = 1.0 if cost_model.is_in_seconds else None
        self._small_step_s: float | None = None
        self._load_s: dict[str, float] = {}
        self._num_loads: dict[str, int] = {}
        self._observed_at_s: dict[str, float] = {}

    def load_cost(self, tier: str) -> float:
        """Of one chunk, all the way to the tier that computes."""
        model, seconds = self._cost_model, self._load_s.get(tier)
        if seconds is None or self._unit_s is None:
            return LOAD_OVERHEAD * model.load_costs.get(tier, 0.0)
        return LOAD_OVERHEAD * seconds / self._unit_s + model.swap_in_cost

    def is_loaded(self, tier: str, position: int, num_tokens: int) -> bool:
        """Whether loading the chunk alone costs no more than computing `num_tokens` of it; see CostModel.is_loaded."""
        chunk_size = self._cost_model.chunk_size
        return self.load_cost(tier) * chunk_size <= self._cost_model.chunk_cost(position) * num_tokens

    def compute_cost(self, chunks: Iterable[tuple[int, int]]) -> float:
        """Of these (position, number of tokens) together."""
        model = self._cost_model
        return sum(model.chunk_cost(position) * num_tokens for position, num_tokens in chunks) / model.chunk_size

    def compute_s(self, tier: str, chunks: Iterable[tuple[int, int]]) -> float | None:
        """Seconds to compute these (position, number of tokens) again.

        None unless that, and how fast the tier is, was observed.
        """
        if self._unit_s is None or tier not in self._load_s:
            return None
        return self.compute_cost(chunks) * self._unit_s

    @property
    def token_compute_s(self) -> tuple[float, float] | None:
        """Seconds to compute the first token of a context, and how much longer each further one takes than the one before.

        None until a step that computes a prompt was observed.
        """
        if self._unit_s is None:
            return None
        unit_s = self._unit_s / self._cost_model.chunk_size
        return self._cost_model.constant * unit_s, self._cost_model.per_context_token * unit_s

    def token_load_s(self, tier: str) -> float | None:
        """Seconds to load a token's KV from a slow tier; None until a load was observed."""
        seconds = self._load_s.get(tier)
        return None if seconds is None else seconds / self._cost_model.chunk_size

    def needs_probe(self, tier: str, now: float) -> bool:
        """Whether the price is so old that it may be wrong."""
        return now - self._observed_at_s.get(tier, now) > PROBE_AFTER_S

    def note_load(self, tier: str, seconds: float, now: float) -> None:
        """A chunk was loaded in so much of the tier's time."""
        known = self._load_s.get(tier, seconds)
        self._num_loads[tier] = num_loads = self._num_loads.get(tier, 0) + 1
        self._load_s[tier] = known + max(LOAD_WEIGHT, 1 / num_loads) * (seconds - known)
        self._observed_at_s[tier] = now

    def learns_from(self, num_tokens: int) -> bool:
        """Whether a step that computes so many tokens says what computing costs.

        A few decodes do not, as they cost as much for one token as for some dozens.
        """
        return not self._cost_model.is_in_seconds and num_tokens >= 2 * self._cost_model.chunk_size

    def note_step(self, segments: Iterable[QuerySegment], seconds: float) -> None:
        """A step was computed.

        What a step takes in any case does not count, because it is made for the new tokens, whatever is loaded: about what a
        step takes that computes little.
        """
        model = self._cost_model
        if model.is_in_seconds:
            return
        num_tokens, cost = 0, 0.0
        for segment in segments:
            context_len = segment.start + segment.query_len / 2
            num_tokens += segment.query_len
            cost += segment.query_len * (model.constant + model.per_context_token * context_len) / model.chunk_size
        if not self.learns_from(num_tokens):
            if num_tokens:
                known = seconds if self._small_step_s is None else self._small_step_s
                weight = STEP_WEIGHT if seconds < known else LOAD_WEIGHT  # one that was held up says little
                self._small_step_s = known + weight * (seconds - known)
            return
        unit_s = (seconds - (self._small_step_s or 0.0)) / cost
        if unit_s > 0:
            known = unit_s if self._unit_s is None else self._unit_s
            self._unit_s = known + STEP_WEIGHT * (unit_s - known)
