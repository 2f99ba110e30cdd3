"""Carries out hints: what is said of each chunk at the end of a request, within the budget of its tenant.

Knows no order of eviction: what it says (Chunk.reuse) the policy goes by.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from engine.core.cache.index import Chunk
from engine.core.cache.tenant_shares import TenantShares
from engine.core.cache.tier import Tiers
from engine.core.retention import MAX_TTL_S, KeptSpan, RetentionHint, RetentionOutcome, reuse_of
from engine.core.reuse import NO_REUSE, Reuse

OUTCOMES = ("accepted", "clipped", "refused")
HINTS_ARE_OFF = RetentionOutcome(
    "refused", "this server takes no hints: its operator has to set kv_hints to client or learned"
)


class _Kept(NamedTuple):
    until_s: float
    conversation_id: str


class Retention:
    """The chunks that hints keep, by tenant, each for some time and at most as many as the tenant's budget.

    A chunk counts once, wherever it lies and however many conversations share it, as long as its weight is above 1.

    The budget of a tenant is its share, by weight, of `max_chunks`.
    counts: hints by outcome.
    """

    def __init__(self, tiers: Tiers, shares: TenantShares, max_chunks: int, chunk_size: int) -> None:
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self._tiers = tiers
        self._shares = shares
        self._max_chunks = max_chunks
        self._chunk_size = chunk_size
        self._kept: dict[str, dict[Chunk, _Kept]] = {}
        self._by_conversation: dict[str, dict[Chunk, None]] = {}
        self._ends: list[tuple[float, int, Chunk]] = []  # a heap, with entries that no longer hold
        self._num_ends = 0

    def budget(self, tenant: str) -> int:
        """Chunks that the tenant's hints may keep."""
        return int(self._max_chunks * self._shares.share(tenant))

    def count_kept(self, tenant: str | None = None) -> int:
        """Chunks that hints keep, of one tenant or of all."""
        tenants = tuple(self._kept.values()) if tenant is None else (self._kept.get(tenant, {}),)
        return sum(map(len, tenants))

    # -- what is said --------------------------------------------------------------------------------------------------

    def say_at_end(
        self,
        hint: RetentionHint | None,
        row: Sequence[Chunk],
        conversation_id: str,
        tenant: str,
        reuse: Reuse,
        now: float,
    ) -> tuple[list[Reuse], RetentionOutcome | None]:
        """What a request says at its end of each chunk of its context, on the engine's clock, and what became of its hint.

        What the conversation's earlier hints keep beside this context is superseded: nothing keeps it any more.

        row: its chunks, named as far as they will be. reuse: what is said of all without a hint.
        """
        self._supersede(conversation_id, row)
        if hint is None:
            return [reuse] * len(row), None
        return self._divide(hint, row, conversation_id, tenant, now)

    def say_while_idle(
        self, hint: RetentionHint, chunks: Sequence[Chunk], conversation_id: str, tenant: str, now: float
    ) -> RetentionOutcome:
        """Say it of a conversation's chunks while no request of it runs; those that another one uses keep what they have."""
        stated, outcome = self._divide(hint, chunks, conversation_id, tenant, now)
        for chunk, reuse in zip(chunks, stated, strict=True):
            if not chunk.pins:
                is_own = chunk.num_users == 1 and chunk.last_user_id == conversation_id
                self._restate(chunk, reuse if is_own else chunk.reuse.merged(reuse, now), now, tenant)
        return outcome

    def expect(self, chunks: Sequence[Chunk], expected_use_s: float, now: float) -> None:
        """The next use of unpinned chunks is expected then; a client's own statement counts for more."""
        for chunk in chunks:
            if not chunk.pins and chunk.reuse.expected_use_s is None and chunk.num_users == 1:
                reuse = replace(chunk.reuse, expected_use_s=expected_use_s)
                self._restate(chunk, reuse, now, chunk.tenant)

    def note(self, chunk: Chunk, now: float) -> None:
        """What is said of a chunk has changed."""
        weight, until_s = chunk.reuse.weight, chunk.reuse.keep_until_s
        if chunk.key is None or weight <= 1 or until_s is None or until_s <= now:
            self.forget(chunk)
            return
        before = self._kept.get(chunk.tenant, {}).get(chunk)
        entry = _Kept(until_s, chunk.last_user_id or "")
        if entry == before:
            return
        self.forget(chunk)
        self._kept.setdefault(chunk.tenant, {})[chunk] = entry
        self._by_conversation.setdefault(entry.conversation_id, {})[chunk] = None
        self._num_ends += 1
        heapq.heappush(self._ends, (until_s, self._num_ends, chunk))

    def forget(self, chunk: Chunk) -> None:
        """No hint keeps that chunk any more, if one did."""
        of_tenant = self._kept.get(chunk.tenant)
        entry = None if of_tenant is None else of_tenant.pop(chunk, None)
        if of_tenant is None or entry is None:
            return
        if not of_tenant:
            del self._kept[chunk.tenant]
        of_conversation = self._by_conversation[entry.conversation_id]
        del of_conversation[chunk]
        if not of_conversation:
            del self._by_conversation[entry.conversation_id]

    def end_hints(self, now: float) -> None:
        """Hints whose time is over keep nothing."""
        ends = self._ends
        while ends and ends[0][0] <= now:
            until_s, _, chunk = heapq.heappop(ends)
            entry = self._kept.get(chunk.tenant, {}).get(chunk)
            if entry is not None and entry.until_s <= until_s:
                self.forget(chunk)
        if len(ends) > 64 and len(ends) > 4 * self.count_kept():
            self._ends = [entry for entry in ends if entry[2] in self._kept.get(entry[2].tenant, {})]
            heapq.heapify(self._ends)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _restate(self, chunk: Chunk, reuse: Reuse, now: float, tenant: str) -> None:
        """Say something else of an unpinned chunk of that tenant, who is not known if another process has left it."""
        if chunk.reuse == reuse:
            return
        self._tiers.unfile(chunk)
        chunk.reuse, chunk.tenant = reuse, tenant
        chunk.is_to_store |= reuse.weight > 1
        self._tiers.file(chunk)
        self.note(chunk, now)

    def _supersede(self, conversation_id: str, row: Sequence[Chunk]) -> None:
        of_conversation = self._by_conversation.get(conversation_id)
        if of_conversation is None:
            return
        for chunk in of_conversation.keys() - set(row):
            if chunk.num_users == 1 and not chunk.pins:
                self._restate(chunk, NO_REUSE, 0.0, chunk.tenant)

    def _divide(
        self, hint: RetentionHint, row: Sequence[Chunk], conversation_id: str, tenant: str, now: float
    ) -> tuple[list[Reuse], RetentionOutcome]:
        """What the hint says of each chunk of a context, as far as the budget reaches, and what became of it.

        The highest priority comes first, then the front.
        """
        self.end_hints(now)
        size, kept = self._chunk_size, self._kept.get(tenant, {})
        spans = [hint.span_at(chunk.position * size, chunk.position * size + max(chunk.num_tokens, 1)) for chunk in row]
        said: dict[KeptSpan, Reuse] = {span: reuse_of(span, hint.expected_return_s).since(now) for span in set(spans)}
        stated = [said[span] for span in spans]
        wanted = sorted(
            (number for number, reuse in enumerate(stated) if reuse.weight > 1 and row[number].key is not None),
            key=lambda number: (-stated[number].weight, row[number].position),
        )
        # Of those that are kept already, the ones that others share stay so in any case; the others are asked for anew.
        shared = {
            chunk for chunk in row if chunk in kept and (chunk.num_users > 1 or chunk.last_user_id != conversation_id)
        }
        left = self.budget(tenant) - len(kept) + sum(chunk in kept and chunk not in shared for chunk in row)
        num_kept, num_refused, longest_s = 0, 0, now
        for number in wanted:
            chunk, reuse = row[number], stated[number]
            if chunk not in shared:
                if left <= 0:
                    num_refused += chunk.num_tokens
                    stated[number] = replace(reuse, weight=1.0, keep_until_s=None)
                    continue
                left -= 1
            num_kept += chunk.num_tokens
            longest_s = max(longest_s, now if reuse.keep_until_s is None else reuse.keep_until_s)
        return stated, self._outcome(hint, num_kept, num_refused, longest_s if num_kept else None, tenant)

    def _outcome(
        self, hint: RetentionHint, num_kept: int, num_refused: int, until_s: float | None, tenant: str
    ) -> RetentionOutcome:
        reasons = []
        if num_refused:
            most = self.budget(tenant) * self._chunk_size
            reasons.append(
                f"{num_refused} more tokens are not kept, because hints of one client may keep {most} tokens at a time; "
                "release what is no longer needed, or keep less"
            )
        if any(span.ttl_s is not None and span.ttl_s > MAX_TTL_S for span in hint.spans):
            reasons.append(f"nothing is kept for longer than {MAX_TTL_S:g} seconds")
        outcome = "accepted" if not reasons else "clipped" if num_kept else "refused"
        self.counts[outcome] += 1
        return RetentionOutcome(outcome, "; ".join(reasons), num_kept, until_s)

    # -- proof ---------------------------------------------------------------------------------------------------------

    def check_integrity(self, chunks: set[Chunk], now: float) -> None:
        """Raises AssertionError unless exactly the chunks are counted that a hint keeps.

        chunks: all that are named.
        """
        self.end_hints(now)
        counted = {chunk for of_tenant in self._kept.values() for chunk in of_tenant}
        keeping = {
            chunk
            for chunk in chunks
            if chunk.reuse.weight > 1 and chunk.reuse.keep_until_s is not None and chunk.reuse.keep_until_s > now
        }
        pinned = {chunk for chunk in counted if chunk.pins}
        assert counted - pinned == keeping - pinned, (counted, keeping)
        assert {chunk for chunks in self._by_conversation.values() for chunk in chunks} == counted
        assert all(chunk.tenant == tenant for tenant, of_tenant in self._kept.items() for chunk in of_tenant)
