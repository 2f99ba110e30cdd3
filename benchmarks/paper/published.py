"""What the paper shows: points read off Figures 10a and 10b, and rates at one latency of all panels of Figures 10 and 11."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

DIGITISED = Path(__file__).parent / "digitised_10ab.csv"
BASELINES = ("vllm-0.2.0", "pensieve-gpu-only")
SYSTEMS = ("vllm-0.2.0", "tensorrt-llm-0.12", "pensieve-gpu-only", "pensieve")
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: a model, a data set, and the rates (requests a second) at which each system reaches `level` s/token.

    rates: in the order of SYSTEMS; read off the plots, good to some 3 %. num_gpus: that share the model.
    """

    model: str
    dataset: str
    level: float
    rates: tuple[float, ...]
    num_gpus: int = 1

    def rate(self, system: str) -> float:
        return self.rates[SYSTEMS.index(system)]


# 10c and 10d, 11a and 11b are our names, in the order of the paper's text.
PANELS = {
    "10a": Panel("opt-13b", "sharegpt", 0.12, (2.48, 2.96, 2.67, 3.40)),
    "10b": Panel("llama-2-13b-gqa", "sharegpt", 0.18, (4.75, 5.17, 5.21, 8.11)),
    "10c": Panel("opt-13b", "ultrachat", 0.12, (3.27, 3.45, 3.28, 3.87)),
    "10d": Panel("llama-2-13b-gqa", "ultrachat", 0.10, (4.92, 5.45, 5.70, 7.85)),
    "11a": Panel("opt-66b", "sharegpt", 0.20, (1.60, 1.98, 2.08, 3.27), num_gpus=4),
    "11b": Panel("llama-2-70b", "sharegpt", 0.40, (2.32, 2.86, 5.00, 6.90), num_gpus=4),
}
# Figure 12: ms of one layer's attention, 32 requests of 8 query tokens, by tokens of context.
KERNEL_CONTEXTS = (256, 512, 1024, 2048)
KERNEL_MS = {
    "contiguous": (0.11, 0.15, 0.30, 0.57),
    "copy-out": (0.45, 0.58, 1.20, 2.21),
    "multi-round": (0.66, 0.99, 2.07, 4.22),
    "pensieve": (0.085, 0.12, 0.27, 0.54),
}
# Figure 13 (Llama-2-13B, 0.12 s/token): more requests with one batch. Figure 14 (OPT-13B): against LRU, more requests at
# 0.12 s/token; at most so many points more hits in the CPU tier, and so many tokens fewer recomputed.
UNIFIED_GAIN = 0.11
RETENTION_GAIN, RETENTION_HIT_POINTS, RETENTION_RECOMPUTED = 0.05, 4.4, -0.146


def read_digitised(panel: str) -> dict[str, list[Point]]:
    """(requests a second, seconds a token) by system; of 10a and 10b."""
    points: dict[str, list[Point]] = {}
    with DIGITISED.open() as stream:
        for row in csv.DictReader(stream):
            if row["figure"] == panel:
                point = (float(row["request_rate_per_s"]), float(row["latency_s_per_token"]))
                points.setdefault(row["system"], []).append(point)
    return points


def rate_at(points: Sequence[Point], level: float) -> float | None:
    """The rate at which a curve passes a latency, between two of its points; None if it does not."""
    for (rate, latency), (next_rate, next_latency) in pairwise(points):
        if latency <= level < next_latency:
            return rate + (next_rate - rate) * (level - latency) / (next_latency - latency)
    return None


def latency_at(points: Sequence[Point], rate: float) -> float | None:
    """The latency of a curve at a rate, between two of its points; None beyond them."""
    for (left, latency), (right, next_latency) in pairwise(points):
        if left <= rate <= right:
            return latency + (next_latency - latency) * (rate - left) / (right - left)
    return None
