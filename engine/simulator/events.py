"""The heap of events: what happens when.

Of one time, arrivals come before ends of transfers, and these before ends of steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

CHANGE, ARRIVAL, END_OF_TRANSFER, END_OF_STEP = range(4)


class Events:
    """Calls in order of time; those of one time and kind in the order in which they were added."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Callable[[float, Any], None], Any]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, time_s: float, kind: int, call: Callable[[float, Any], None], argument: Any) -> None:
        """Call `call(time, argument)` then."""
        self._num_added += 1
        heapq.heappush(self._heap, (time_s, kind, self._num_added, call, argument))

    def run_next(self, until_s: float) -> float | None:
        """Carry out the next event and return its time; None if there is none before `until_s`."""
        if not self._heap or self._heap[0][0] >= until_s:
            return None
        time_s, _, _, call, argument = heapq.heappop(self._heap)
        call(time_s, argument)
        return time_s
