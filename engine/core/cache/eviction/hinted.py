"""By retention value and by what was said of each chunk's next use, without harm to tenants that say nothing."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import NamedTuple

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction.lazy_heap import LazyHeap
from engine.core.cache.eviction.retention_value import RetentionValue
from engine.core.cache.index import Chunk
from engine.core.cache.tenant_shares import TenantShares


class _Group(NamedTuple):
    """What is said of a chunk, as far as its place in the order goes.

    kind: "never" used again, "expected" at some time to come, or "idle": nothing is known but its last use.
    """

    kind: str
    weight: float


class HintedRetention:
    """The smallest stated value first; ties go to the front.

    stated value    0 if the chunk is never used again, weight * cost / (expected use - now) until then, else
                    weight * cost / (now - last use)
    plain value     cost / (now - last use)

    Of chunks that are never used again, the least recently used one goes first.

    If a statement keeps a chunk, that is, if its plain value is smaller than the stated value of all others, another one
    goes in its place. That one belongs to the same tenant, or to one that holds more than its share of the tier; if it
    would be another's, the tenant of the chunk that is kept pays, with its own smallest stated value. So no tenant loses
    a chunk of its share for what another one has said.
    """

    def __init__(self, cost_model: CostModel, shares: TenantShares) -> None:
        """No chunk, and no blocks to share yet: see `num_blocks`.

        num_blocks: of the tier, of which each tenant has its share.
        """
        self.num_blocks = 0
        self._cost_model = cost_model
        self._shares = shares
        self._now = 0.0  # what is said of the chunks is as of then
        self._all = _StatedOrder(cost_model)
        self._by_tenant: dict[str, _StatedOrder] = {}  # once there are several
        self._num_of: dict[str, int] = {}
        self._kept = RetentionValue(cost_model)  # those that a statement may keep, by plain value
        # When what was said of a chunk changes; a heap, with old entries.
        self._changes: list[tuple[float, int, Chunk]] = []
        self._num_changes = 0

    def insert(self, chunk: Chunk) -> None:
        self._num_of[chunk.tenant] = self._num_of.get(chunk.tenant, 0) + 1
        if len(self._num_of) > 1 and not self._by_tenant:
            for held in self._all:
                self._own(held).insert(held, self._all.group_of[held])
        self._place(chunk)

    def remove(self, chunk: Chunk) -> None:
        self._displace(chunk)
        self._num_of[chunk.tenant] -= 1
        if not self._num_of[chunk.tenant]:
            del self._num_of[chunk.tenant]
            self._by_tenant.pop(chunk.tenant, None)

    def _place(self, chunk: Chunk) -> None:
        group = group_at(chunk, self._now)
        self._all.insert(chunk, group)
        if self._by_tenant or len(self._num_of) > 1:
            self._own(chunk).insert(chunk, group)
        if group.weight > 1 or group.kind == "expected":
            self._kept.insert(chunk)
        reuse = chunk.reuse
        changes = [t for t in (reuse.keep_until_s, reuse.expected_use_s) if t is not None and self._now < t < math.inf]
        if changes:
            self._num_changes += 1
            heapq.heappush(self._changes, (min(changes), self._num_changes, chunk))

    def _displace(self, chunk: Chunk) -> None:
        self._all.remove(chunk)
        if chunk.tenant in self._by_tenant:
            self._by_tenant[chunk.tenant].remove(chunk)
        if chunk in self._kept:
            self._kept.remove(chunk)

    def _own(self, chunk: Chunk) -> _StatedOrder:
        if chunk.tenant not in self._by_tenant:
            self._by_tenant[chunk.tenant] = _StatedOrder(self._cost_model)
        return self._by_tenant[chunk.tenant]

    def _advance(self, now: float) -> None:
        """Statements that have ended by `now` no longer hold."""
        self._now = now
        while self._changes and self._changes[0][0] <= now:
            chunk = heapq.heappop(self._changes)[2]
            if chunk in self._all and self._all.group_of[chunk] != group_at(chunk, now):
                self._displace(chunk)
                self._place(chunk)
        if len(self._changes) > 64 and len(self._changes) > 4 * len(self._all):  # those of chunks that have gone
            self._changes = [entry for entry in self._changes if entry[2] in self._all]
            heapq.heapify(self._changes)

    def choose_victim(self, now: float) -> Chunk | None:
        """The next to go; see above. Takes longer with each weight that is in use, not with the number of chunks."""
        self._advance(now)
        victim = self._all.choose_victim(now)
        if victim is None or len(self._num_of) < 2:
            return victim
        kept = self._kept.choose_victim(now)
        if kept is None or kept.tenant == victim.tenant:
            return victim
        if plain_value(self._cost_model, kept, now) >= stated_value(self._cost_model, victim, now):
            return victim
        if not self._shares.is_within(victim.tenant, self._num_of, self.num_blocks):
            return victim
        return self._by_tenant[kept.tenant].choose_victim(now)

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        """By stated value, unless what is said of `other` would keep it in place of another tenant's, within its share."""
        left, right = stated_value(self._cost_model, chunk, now), stated_value(self._cost_model, other, now)
        if (
            chunk.tenant != other.tenant
            and left < right
            and self._shares.is_within(chunk.tenant, self._num_of, self.num_blocks)
        ):
            right = min(right, plain_value(self._cost_model, other, now))
        return (left, chunk.position) < (right, other.position)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._all)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._all


class _StatedOrder:
    """Chunks by their stated value, one order for each group."""

    def __init__(self, cost_model: CostModel) -> None:
        """group_of: the group of each chunk that is held."""
        self.group_of: dict[Chunk, _Group] = {}
        self._cost_model = cost_model
        self._groups: dict[_Group, RetentionValue | _SoonestLast | _OldestFirst] = {}

    def insert(self, chunk: Chunk, group: _Group) -> None:
        if group not in self._groups:
            self._groups[group] = self._make(group)
        self._groups[group].insert(chunk)
        self.group_of[chunk] = group

    def remove(self, chunk: Chunk) -> None:
        group = self.group_of.pop(chunk)
        self._groups[group].remove(chunk)
        if not len(self._groups[group]):
            del self._groups[group]

    def _make(self, group: _Group) -> RetentionValue | _SoonestLast | _OldestFirst:
        if group.kind == "never":
            return _OldestFirst()
        return RetentionValue(self._cost_model) if group.kind == "idle" else _SoonestLast(self._cost_model)

    def choose_victim(self, now: float) -> Chunk | None:
        heads = [group.choose_victim(now) for group in self._groups.values()]
        if len(heads) == 1:
            return heads[0]
        costs = self._cost_model
        return min(
            (head for head in heads if head is not None),
            key=lambda head: (stated_value(costs, head, now), head.position),
            default=None,
        )

    def __len__(self) -> int:
        return len(self.group_of)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.group_of)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self.group_of


class _OldestFirst(LazyHeap):
    """Chunks that are never used again."""

    def __init__(self) -> None:
        super().__init__(lambda chunk: (chunk.last_active, chunk.position))

    def choose_victim(self, now: float) -> Chunk | None:
        return self.first()


class _SoonestLast:
    """Chunks that are expected at some time to come: the smallest cost / (expected use - now) first; ties go to the front.

    At one position that is the one that is expected last. The inverse of a value only falls while time passes, so what it
    was at some earlier time bounds it: a position is looked at only if its bound is the largest.
    """

    def __init__(self, cost_model: CostModel) -> None:
        """bounds: by position, as of whenever it was looked at last. ranking: (-bound, position), a heap; others are old."""
        self._cost_model = cost_model
        self._heaps: dict[int, LazyHeap] = {}  # by position
        self._bounds: dict[int, float] = {}
        self._ranking: list[tuple[float, int]] = []
        self._num_chunks = 0
        self._asked_at = 0.0

    def insert(self, chunk: Chunk) -> None:
        position = chunk.position
        if position not in self._heaps:
            self._heaps[position] = LazyHeap(lambda chunk: -(chunk.reuse.expected_use_s or 0.0))
        self._heaps[position].insert(chunk)
        self._num_chunks += 1
        bound = self._inverse(chunk, self._asked_at)
        if bound > self._bounds.get(position, -math.inf):
            self._bounds[position] = bound
            heapq.heappush(self._ranking, (-bound, position))

    def remove(self, chunk: Chunk) -> None:
        heap = self._heaps[chunk.position]
        heap.remove(chunk)
        self._num_chunks -= 1
        if not len(heap):
            del self._heaps[chunk.position], self._bounds[chunk.position]

    def choose_victim(self, now: float) -> Chunk | None:
        """`now` never goes back."""
        self._asked_at = now
        ranking = self._ranking
        while ranking:
            bound, position = ranking[0]
            heap = self._heaps.get(position)
            head = None if heap is None else heap.first()
            if head is None or self._bounds[position] != -bound:
                heapq.heappop(ranking)
                continue
            inverse = self._inverse(head, now)
            if inverse == -bound:
                return head
            self._bounds[position] = inverse
            heapq.heapreplace(ranking, (-inverse, position))
        return None

    def _inverse(self, chunk: Chunk, now: float) -> float:
        return ((chunk.reuse.expected_use_s or 0.0) - now) / self._cost_model.chunk_cost(chunk.position)

    def __len__(self) -> int:
        return self._num_chunks


def group_at(chunk: Chunk, now: float) -> _Group:
    """What is said of a chunk, as it holds at `now`."""
    reuse = chunk.reuse
    if reuse.expected_use_s == math.inf:
        return _Group("never", 1.0)
    weight = reuse.weight if reuse.keep_until_s is None or reuse.keep_until_s > now else 1.0
    is_expected = reuse.expected_use_s is not None and reuse.expected_use_s > now
    return _Group("expected" if is_expected else "idle", weight)


def stated_value(cost_model: CostModel, chunk: Chunk, now: float) -> float:
    """See HintedRetention; infinite for a chunk that was used just now, if nothing more is known."""
    kind, weight = group_at(chunk, now)
    if kind == "never":
        return 0.0
    expected_use_s = chunk.reuse.expected_use_s
    if kind == "expected" and expected_use_s is not None:
        return weight * cost_model.chunk_cost(chunk.position) / (expected_use_s - now)
    return weight * plain_value(cost_model, chunk, now)


def plain_value(cost_model: CostModel, chunk: Chunk, now: float) -> float:
    """See HintedRetention; infinite for a chunk that was used just now."""
    idle_s = now - chunk.last_active
    return cost_model.chunk_cost(chunk.position) / idle_s if idle_s > 0 else math.inf
