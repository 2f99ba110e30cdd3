"""Step times that were measured on a machine, by `pensieve profile --steps`."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.core.cache.cost_model import CostModel
from engine.core.tier_table import CPU
from engine.errors import ConfigError
from engine.simulator.step_cost import StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """A step's time by what it computes; means, in seconds.

    measured_on: model, dtype, device and processor, in words.
    num_tokens_s: number of tokens -> seconds of a step that computes a prompt of so many, attention left out, in the executor
        alone.
    decodes_s: number of requests -> seconds from one step to the next if each of them decodes, context left out, with all
        that the engine does between two steps. Both ascend, with at least two numbers.
    pair_s: more for each pair (token, token that it attends to) of prompts.
    context_token_s: more for each token that a decode attends to: the pair, and reading the token's KV, which all tokens of a
        prompt do together.
    request_s: more for each request that begins with the step, for what is done before it is scheduled.
    load_s, store_s: of one block.
    chunk_size, bytes_per_block: of these.
    overlaps_copies: copies go beside the computation, as on a GPU; else behind it, on the same cores.
    """

    measured_on: str
    chunk_size: int
    bytes_per_block: int
    num_tokens_s: dict[int, float]
    decodes_s: dict[int, float]
    pair_s: float
    context_token_s: float
    request_s: float
    load_s: float
    store_s: float
    overlaps_copies: bool

    def step_time(self, work: StepWork) -> float:
        num_decodes = work.num_decodes
        compute_s = work.num_prompt_pairs * self.pair_s + work.decode_context_len * self.context_token_s
        compute_s += (
            work.prompt_context_len * max(0.0, self.context_token_s - self.pair_s) + work.num_starts * self.request_s
        )
        if work.num_prompt_tokens:
            # Tokens are computed alike. What decodes add is a row of logits and a text each, and what goes with any step.
            compute_s += _interpolate(self.num_tokens_s, num_decodes + work.num_prompt_tokens)
            # (Alone, decodes may take less: a GPU replays them, and launches what is beside a long prompt kernel by kernel.)
            beside = max(1, num_decodes)
            compute_s += max(0.0, _interpolate(self.decodes_s, beside) - _interpolate(self.num_tokens_s, beside))
        elif num_decodes:
            compute_s += _interpolate(self.decodes_s, num_decodes)
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

    def with_chunks_of(self, chunk_size: int) -> StepTable:
        """The same for blocks of another size."""
        scale = chunk_size / self.chunk_size
        return replace(
            self,
            chunk_size=chunk_size,
            bytes_per_block=round(self.bytes_per_block * scale),
            load_s=self.load_s * scale,
            store_s=self.store_s * scale,
        )

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
            data |= {name: _ascending(data[name]) for name in ("num_tokens_s", "decodes_s")}
            table = cls(**data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no table of steps ({error}); make one with `pensieve profile --steps FILE`", param="steps"
            ) from error
        return table


def _ascending(seconds: Mapping[str, float]) -> dict[int, float]:
    """As JSON has it. Raises ValueError."""
    if len(seconds) < 2:
        raise ValueError("fewer than two sizes of a step")
    return dict(sorted((int(num), float(value)) for num, value in seconds.items()))


def _interpolate(seconds: Mapping[int, float], num: int) -> float:
    """Linear between two numbers that were measured; beyond the last one as between the last two."""
    if num in seconds:
        return seconds[num]
    sizes = list(seconds)
    if num <= sizes[0]:
        return seconds[sizes[0]]
    right = min(bisect_right(sizes, num), len(sizes) - 1)
    n1, n2 = sizes[right - 1], sizes[right]
    s1, s2 = seconds[n1], seconds[n2]
    return s1 + (s2 - s1) * (num - n1) / (n2 - n1)
