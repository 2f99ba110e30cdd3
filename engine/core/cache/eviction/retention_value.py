"""By the cost of computing a chunk again, for the time that it has been idle: the paper's policy."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import repeat
from operator import add, mul, sub, truediv

from engine.core.cache.cost_model import CostModel
from engine.core.cache.index import Chunk

# Rows are ranked in groups of so many.
GROUP_LEN = 16
# More than what rounding can do to the order of two values.
ROUNDING = 1e-12


class RetentionValue:
    """Smallest `chunk_cost(position) / (now - last_active)` first (paper section 4.3.1); ties go to the front.

    The ranking moves with time, so no heap over all chunks can hold it. But at any one position the cost is the same for
    all, hence the least recently used one has the smallest value: one row by `last_active` per position, and the minimum
    over the heads of the rows is the exact minimum over all chunks.

    The inverse of a value, its urgency, grows linearly, and fastest where the cost is smallest. So the urgencies of a group
    of rows at an earlier time say how large its largest one can be now, and only groups that may have the largest one of all
    are ranked anew.
    """

    def __init__(self, cost_model: CostModel) -> None:
        """Costs rise with the position. The first lists are by position, the others by group.

        rows: heaps of (last use, stamp, chunk); the first entry of each is held, others may be old. stamps: of the chunks
        that are held; an entry with another one is old. heads: the last use of each row's first chunk; infinite if the row is
        empty. urgencies: of the heads, at the time in `ranked_at` of their group.
        ceilings: no urgency of the group is larger at that time. rates: none grows faster. bounds: no urgency is larger at
        `asked_at`; the largest one itself if the group is ranked at that time.
        """
        self._cost_model = cost_model
        self._stamps: dict[Chunk, int] = {}
        self._num_inserted = self._num_entries = 0
        self._rows: list[list[tuple[float, int, Chunk]]] = []
        self._costs: list[float] = []
        self._heads: list[float] = []
        self._urgencies: list[float] = []
        self._ranked_at: list[float] = []
        self._ceilings: list[float] = []
        self._rates: list[float] = []
        self._bounds: list[float] = []
        self._asked_at = 0.0

    def insert(self, chunk: Chunk) -> None:
        position, last_active = chunk.position, chunk.last_active
        while position >= len(self._rows):
            self._add_group()
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
        """The chunk with the smallest retention value, whatever the number of chunks. `now` never goes back."""
        if not self._stamps:
            return None
        ranked_at = self._ranked_at
        if now != self._asked_at:
            self._asked_at = now
            growth = map(mul, map(sub, repeat(now), ranked_at), self._rates)
            self._bounds = list(map(add, self._ceilings, growth))
        bounds = self._bounds
        while ranked_at[group := bounds.index(most := max(bounds))] != now:
            self._rank(group, now)
        if most > 0:
            position = self._urgencies.index(most, group * GROUP_LEN)
        else:  # all were used just now
            position = next(number for number, row in enumerate(self._rows) if row)
        return self._rows[position][0][2]

    def _rank(self, group: int, now: float) -> None:
        rows = slice(group * GROUP_LEN, (group + 1) * GROUP_LEN)
        urgencies = list(map(truediv, map(sub, repeat(now), self._heads[rows]), self._costs[rows]))
        self._urgencies[rows] = urgencies
        self._ranked_at[group] = now
        self._set_largest(group, max(urgencies))

    def _set_head(self, position: int, last_active: float) -> None:
        group = position // GROUP_LEN
        self._heads[position] = last_active
        self._urgencies[position] = (self._ranked_at[group] - last_active) / self._costs[position]
        self._set_largest(group, max(self._urgencies[group * GROUP_LEN : (group + 1) * GROUP_LEN]))

    def _set_largest(self, group: int, urgency: float) -> None:
        """The largest one of the group is that, at the time at which it is ranked."""
        self._ceilings[group] = urgency * (1 + ROUNDING) if urgency > 0 else urgency
        self._bounds[group] = urgency if self._ranked_at[group] == self._asked_at else math.inf

    def _add_group(self) -> None:
        for position in range(len(self._rows), len(self._rows) + GROUP_LEN):
            self._costs.append(self._cost_model.chunk_cost(position) or 1e-300)  # divided by
            self._rows.append([])
            self._heads.append(math.inf)
            self._urgencies.append(-math.inf)
        self._rates.append((1 + ROUNDING) / self._costs[-GROUP_LEN])
        self._ranked_at.append(self._asked_at)
        self._ceilings.append(-math.inf)
        self._bounds.append(-math.inf)

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
