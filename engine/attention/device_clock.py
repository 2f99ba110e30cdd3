"""How long a device takes for something: what `auto` options decide by at the start."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# Seconds from a call until the device has done what it asked for.
SecondsOf = Callable[[Callable[[], object]], float]

# Calls that the median is taken of.
NUM_TIMED = 5


def seconds_on(device: torch.device) -> SecondsOf:
    """By the clock, on a CUDA device: the median of a few calls after one that does not count."""

    def once(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def seconds_of(call: Callable[[], object]) -> float:
        return statistics.median([once(call) for _ in range(NUM_TIMED + 1)][1:])

    return seconds_of
