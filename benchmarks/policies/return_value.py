"""By the cost of computing a chunk again, times the rate at which chunks like it come back, as learned."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from return_history import EDGES, ReturnHistory, bucket_of, class_of

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction.lazy_heap import LazyHeap
from engine.core.cache.index import Chunk

# What a group is ranked by: its value, the position of its head, the last use, its class.
_Rank = tuple[float, int, float, int]


class ReturnValue:
    """Smallest `chunk_cost(position) * rate(class, idle time)` first; of equal ones the front, then the least recently used.

    The rate is a constant for each class and bucket of idle time (see ReturnHistory). Chunks of one class and one last use,
    such as what one turn leaves, are a group: its first chunk has its smallest value, because costs rise with the position,
    and the value of that one changes only if the group comes to another bucket, or something new has been learned. So one
    heap of groups is kept in order, and few of them change between two victims, whatever the number of chunks.
    """

    LEARNS_FROM = ReturnHistory

    def __init__(self, cost_model: CostModel, history: ReturnHistory | None = None) -> None:
        """history: what the policies of all tiers learn from; None = nothing is learned, and the prior holds.

        ranking: groups by rank, a heap; an entry whose rank is not its group's is old. aging: groups by the time at which
        they come to the next bucket, a heap.
        """
        self._history = history if history is not None else ReturnHistory()
        self._version = self._history.version
        self._cost_model = cost_model
        self._costs: list[float] = []  # by position
        self._groups: dict[tuple[int, float], _Group] = {}
        self._ranking: list[tuple[_Rank, _Group]] = []
        self._aging: list[tuple[float, int, _Group]] = []
        self._num_made = 0
        self._num_chunks = 0

    def insert(self, chunk: Chunk) -> None:
        number, last_active = class_of(chunk), chunk.last_active
        group = self._groups.get((number, last_active))
        if group is None:
            self._num_made += 1
            group = self._groups[number, last_active] = _Group(number, last_active, self._num_made)
            heapq.heappush(self._aging, (last_active + EDGES[1], group.made, group))
        self._num_chunks += 1
        while len(self._costs) <= chunk.position:
            self._costs.append(self._cost_model.chunk_cost(len(self._costs)))
        group.chunks.insert(chunk)
        if group.chunks.first() is chunk:
            self._rank_group(group, chunk.position)

    def remove(self, chunk: Chunk) -> None:
        group = self._groups[class_of(chunk), chunk.last_active]
        group.chunks.remove(chunk)
        self._num_chunks -= 1
        if not len(group.chunks):
            del self._groups[group.number, group.last_active]
            group.bucket, group.rank = -1, None
            if len(self._aging) > 64 and len(self._aging) > 2 * len(self._groups):
                self._sort_anew()

    def choose_victim(self, now: float) -> Chunk | None:
        if self._version != self._history.version:
            self._version = self._history.version
            self._sort_anew()
        self._age(now)
        ranking = self._ranking
        while ranking:
            rank, group = ranking[0]
            if rank is group.rank:
                head = group.chunks.first()
                assert head is not None, "a group without chunks has no rank"
                if head.position == rank[1]:
                    return head
                self._rank_group(group, head.position)
            heapq.heappop(ranking)
        return None

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        return self._rank_at(chunk, now) < self._rank_at(other, now)

    def _rank_at(self, chunk: Chunk, now: float) -> _Rank:
        number = class_of(chunk)
        rate = self._history.rates[number][bucket_of(now - chunk.last_active)]
        return self._cost_model.chunk_cost(chunk.position) * rate, chunk.position, chunk.last_active, number

    def __len__(self) -> int:
        return self._num_chunks

    def __iter__(self) -> Iterator[Chunk]:
        return chain.from_iterable(group.chunks for group in self._groups.values())

    def __contains__(self, chunk: object) -> bool:
        if not isinstance(chunk, Chunk):
            return False
        group = self._groups.get((class_of(chunk), chunk.last_active))
        return group is not None and chunk in group.chunks

    # -- groups --------------------------------------------------------------------------------------------------------

    def _rank_group(self, group: _Group, position: int) -> None:
        """The group's first chunk is at that position now, or its rate has changed. It may come too early, never too late."""
        value = self._costs[position] * self._history.rates[group.number][group.bucket]
        group.rank = value, position, group.last_active, group.number
        heapq.heappush(self._ranking, (group.rank, group))
        if len(self._ranking) > 64 and len(self._ranking) > 4 * len(self._groups):
            self._ranking = [(other.rank, other) for other in self._groups.values() if other.rank is not None]
            heapq.heapify(self._ranking)

    def _age(self, now: float) -> None:
        """Rank those anew that have come to another bucket."""
        aging = self._aging
        while aging and aging[0][0] <= now:
            group = heapq.heappop(aging)[2]
            if group.bucket < 0:
                continue
            # By rounding, it may still be in the bucket before; that does not come to pass with the next one.
            group.bucket = max(bucket_of(now - group.last_active), group.bucket)
            if group.bucket + 1 < len(EDGES):
                due_s = max(group.last_active + EDGES[group.bucket + 1], now + 1e-6)
                heapq.heappush(aging, (due_s, group.made, group))
            head = group.chunks.first()
            if head is not None:
                self._rank_group(group, head.position)

    def _sort_anew(self) -> None:
        """Forget old entries, and rank all groups by what is known now."""
        self._ranking, self._aging = [], []
        for group in self._groups.values():
            head = group.chunks.first()
            assert head is not None, "a group without chunks is forgotten"
            value = self._costs[head.position] * self._history.rates[group.number][group.bucket]
            group.rank = value, head.position, group.last_active, group.number
            self._ranking.append((group.rank, group))
            if group.bucket + 1 < len(EDGES):
                self._aging.append((group.last_active + EDGES[group.bucket + 1], group.made, group))
        heapq.heapify(self._ranking)
        heapq.heapify(self._aging)


class _Group:
    """Chunks of one class that were used last at one time; the front first.

    made: counts groups. bucket: of idle time; -1 if the group has become empty and is not used any more.
    rank: that of its entry in the ranking that counts.
    """

    __slots__ = ("bucket", "chunks", "last_active", "made", "number", "rank")

    def __init__(self, number: int, last_active: float, made: int) -> None:
        self.number = number
        self.last_active = last_active
        self.made = made
        self.bucket = 0
        self.rank: _Rank | None = None
        self.chunks = LazyHeap(attrgetter("position"))

    def __lt__(self, other: _Group) -> bool:
        """Of two entries of one rank: one of them is old."""
        return self.made < other.made
