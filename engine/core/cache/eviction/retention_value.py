"""By the cost of computing a chunk again, for the time that it has been idle: the paper's policy."""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Iterator
from itertools import repeat
from operator import sub, truediv

from engine.core.cache.cost_model import CostModel
from engine.core.cache.index import Chunk

# Rows are searched in groups of so many.
GROUP_LEN = 64


class RetentionValue:
    """Smallest `chunk_cost(position) / (now - last_active)` first (paper section 4.3.1); ties go to the front.

    The ranking moves with time, so no heap over all chunks can hold it. But at any one position the cost is the same for
    all, hence the least recently used one has the smallest value: one row by `last_active` per position, and the minimum
    over the heads of the rows is the exact minimum over all chunks.

    The inverses of the heads' values are computed at once for each new `now`, and kept up to date until the next one. So a
    victim costs, besides a share of that, a search of the groups and of one group.
    """

    def __init__(self, cost_model: CostModel) -> None:
        """The lists are by position.

        rows: heaps of (last use, stamp, chunk); the first entry of each is held, others may be old. stamps: of the chunks
        that are held; an entry with another one is old. heads: the last use of each row's first chunk; infinite if the row is
        empty. urgencies: the inverses of the heads' values at `ranked_at`. maxima: the largest one of each group.
        """
        self._cost_model = cost_model
        self._rows: list[list[tuple[float, int, Chunk]]] = []
        self._costs: list[float] = []
        self._heads: list[float] = []
        self._stamps: dict[Chunk, int] = {}
        self._num_inserted = self._num_entries = 0
        self._ranked_at = math.nan
        self._urgencies: list[float] = []
        self._maxima: list[float] = []

    def insert(self, chunk: Chunk) -> None:
        position, last_active = chunk.position, chunk.last_active
        if position >= len(self._rows):
            self._add_rows(position + 1)
        self._num_inserted = stamp = self._num_inserted + 1
        self._stamps[chunk] = stamp
        self._num_entries += 1
        heapq.heappush(self._rows[position], (last_active, stamp, chunk))
        if last_active < self._heads[position]:
            self._set_head(position, last_active)

    def remove(self, chunk: Chunk) -> None:
        stamps, row = self._stamps, self._rows[chunk.position]
        del stamps[chunk]
        if row[0][2] is chunk:
            num_before = len(row)
            heapq.heappop(row)
            while row and stamps.get(row[0][2]) != row[0][1]:
                heapq.heappop(row)
            self._num_entries -= num_before - len(row)
            self._set_head(chunk.position, row[0][0] if row else math.inf)
        elif self._num_entries > 64 + 2 * len(stamps):
            self._clear_away()

    def choose_victim(self, now: float) -> Chunk | None:
        """The chunk with the smallest retention value, whatever the number of chunks."""
        if not self._stamps:
            return None
        if now != self._ranked_at:
            self._rank(now)
        maxima, urgencies = self._maxima, self._urgencies
        most = max(maxima)
        if most > 0:
            position = urgencies.index(most, maxima.index(most) * GROUP_LEN)
        else:  # all were used just now
            position = next(number for number, row in enumerate(self._rows) if row)
        return self._rows[position][0][2]

    def _rank(self, now: float) -> None:
        self._ranked_at = now
        urgencies = self._urgencies = list(map(truediv, map(sub, repeat(now), self._heads), self._costs))
        self._maxima = [max(urgencies[start : start + GROUP_LEN]) for start in range(0, len(urgencies), GROUP_LEN)]

    def _set_head(self, position: int, last_active: float) -> None:
        self._heads[position] = last_active
        if position < len(self._urgencies):
            self._urgencies[position] = (self._ranked_at - last_active) / self._costs[position]
            group = position // GROUP_LEN
            self._maxima[group] = max(self._urgencies[group * GROUP_LEN : (group + 1) * GROUP_LEN])

    def _add_rows(self, num_rows: int) -> None:
        for position in range(len(self._rows), num_rows):
            self._costs.append(self._cost_model.chunk_cost(position) or sys.float_info.min)  # divided by
            self._rows.append([])
            self._heads.append(math.inf)
        self._ranked_at, self._urgencies, self._maxima = math.nan, [], []

    def _clear_away(self) -> None:
        """Old entries are the majority."""
        stamps = self._stamps
        for row in self._rows:
            row[:] = [entry for entry in row if stamps.get(entry[2]) == entry[1]]
            heapq.heapify(row)
        self._num_entries = len(stamps)

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        cost = self._cost_model.chunk_cost
        left = _value(cost(chunk.position), now - chunk.last_active)
        right = _value(cost(other.position), now - other.last_active)
        return left < right or (left == right and chunk.position < other.position)

    def __len__(self) -> int:
        return len(self._stamps)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._stamps)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._stamps


def _value(cost: float, idle_s: float) -> float:
    """See RetentionValue; infinite for a chunk that was used just now."""
    return cost / idle_s if idle_s > 0 else math.inf
