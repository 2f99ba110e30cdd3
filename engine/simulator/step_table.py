"""Step times that were measured on a machine, by `pensieve profile --steps`."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.core.cache.cost_model import CostModel
from engine.core.tier_table import CPU
from engine.errors import ConfigError
from engine.simulator.step_cost import StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """A step's time by what it computes; medians, in seconds.

    measured_on: model, dtype, device and processor, in words.
    num_tokens_s: number of tokens -> seconds of a step that computes so many, attention left out; ascending, at least two.
    pair_s: more for each pair (token, token that it attends to) of prompts. context_token_s: more for each token that a
    decode attends to. load_s, store_s: of one block. chunk_size, bytes_per_block: of these. overlaps_copies: copies go beside
    the computation, as on a GPU; else behind it, on the same cores.
    """

    measured_on: str
    chunk_size: int
    bytes_per_block: int
    num_tokens_s: dict[int, float]
    pair_s: float
    context_token_s: float
    load_s: float
    store_s: float
    overlaps_copies: bool

    def step_time(self, work: StepWork) -> float:
        num_tokens = work.num_decodes + work.num_prompt_tokens
        compute_s = work.num_prompt_pairs * self.pair_s + work.decode_context_len * self.context_token_s
        if num_tokens:
            compute_s += self._interpolate(num_tokens)
        copies = (work.num_swap_ins * self.load_s, work.num_swap_outs * self.store_s)
        beside_s = max(compute_s, *copies) if self.overlaps_copies else compute_s + sum(copies)
        return work.num_evictions * self.store_s + beside_s

    def cost_model(self, chunk_size: int) -> CostModel:
        """A chunk costs what it adds to the largest step that was measured."""
        return CostModel(
            constant=max(self._last_slope, 1e-12) * chunk_size,
            per_context_token=self.pair_s * chunk_size,
            chunk_size=chunk_size,
            load_costs={CPU: self.load_s * chunk_size / self.chunk_size},
            is_in_seconds=True,
        )

    @property
    def _last_slope(self) -> float:
        (n1, s1), (n2, s2) = list(self.num_tokens_s.items())[-2:]
        return (s2 - s1) / (n2 - n1)

    def _interpolate(self, num_tokens: int) -> float:
        """Linear between two numbers that were measured; beyond the last one as between the last two."""
        sizes = list(self.num_tokens_s)
        if num_tokens <= sizes[0]:
            return self.num_tokens_s[sizes[0]]
        right = min(bisect_right(sizes, num_tokens), len(sizes) - 1)
        n1, n2 = sizes[right - 1], sizes[right]
        s1, s2 = self.num_tokens_s[n1], self.num_tokens_s[n2]
        return s1 + (s2 - s1) * (num_tokens - n1) / (n2 - n1)

    def save(self, path: Path) -> None:
        """As JSON. Raises ConfigError."""
        try:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error.strerror}; name another file", param="steps"
            ) from error

    @classmethod
    def load(cls, path: Path) -> StepTable:
        """Raises ConfigError if the file is no such table."""
        try:
            data = json.loads(path.read_text())
            sizes = {int(num): float(seconds) for num, seconds in data.pop("num_tokens_s").items()}
            table = cls(num_tokens_s=dict(sorted(sizes.items())), **data)
            if len(sizes) < 2:
                raise ValueError("fewer than two sizes of a step")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no table of steps ({error}); make one with `pensieve profile --steps FILE`", param="steps"
            ) from error
        return table
