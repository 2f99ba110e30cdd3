"""What each tenant's running requests use, and whose request gives way to a tenant that has too little.

Decides, and changes nothing; knows no queue and no step.

The use of a tenant is the larger of its parts of the places (`max_num_seqs`) and of the GPU blocks, over its weight (dominant
resource fairness, Ghodsi et al., NSDI 2011); of two tenants that are equal in this, the one with more places uses more.

Why nothing goes back and forth: a request gives way only if its tenant still uses at least as much afterwards as the
newcomer's will, or if the newcomer's tenant runs nothing. The first makes the largest use among them smaller; the second
makes one tenant fewer run nothing, and no tenant more, as a tenant's oldest running request never gives way. So as long as no
request arrives, grows or ends, there are only so many exchanges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.core.cache.index import Chunk
from engine.core.request import Request


class _Use:
    """The running requests of one tenant, the oldest first, and how many of them hold each chunk."""

    __slots__ = ("chunks", "requests", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.requests: list[Request] = []
        self.chunks: dict[Chunk, int] = {}

    def add(self, request: Request) -> None:
        self.requests.append(request)
        for chunk in request.chunks:
            self.chunks[chunk] = self.chunks.get(chunk, 0) + 1

    def pop_newest(self) -> Request:
        request = self.requests.pop()
        for chunk in request.chunks:
            self.chunks[chunk] -= 1
            if not self.chunks[chunk]:
                del self.chunks[chunk]
        return request


class FairShares:
    """Compares tenants by their parts of `num_places` places and `num_blocks` GPU blocks."""

    def __init__(self, num_places: int, num_blocks: int) -> None:
        self._num_places = num_places
        self._num_blocks = num_blocks

    def choose_to_suspend(self, running: Sequence[Request]) -> Request:
        """The request to suspend if the running ones have run out of blocks: the newest of the tenant that uses the most.

        Each tenant keeps its oldest request, unless none has more than that: then it is the newest of all.

        running: in order of admission.
        """
        uses = [use for use in self._count(running).values() if len(use.requests) > 1]
        return max(uses, key=self._measure).requests[-1] if uses else running[-1]

    def choose_to_give_way(self, newcomer: Request, num_new_blocks: int, running: Sequence[Request]) -> list[Request]:
        """The running requests of other tenants that may be suspended for `newcomer`, in the order in which they go.

        It is always the newest one of the tenant that uses the most then. How many of them it takes is up to the caller.

        num_new_blocks: what the newcomer would take.
        running: in order of admission.
        """
        uses = self._count(running)
        own = uses.pop(newcomer.tenant, _Use(newcomer.weight))
        own_use = self._measure(own, num_more_places=1, num_more_blocks=num_new_blocks)
        giving_way = []
        while uses:
            largest = max(uses, key=lambda tenant: self._measure(uses[tenant]))
            use = uses[largest]
            if len(use.requests) > 1:
                request = use.pop_newest()
                if not own.requests or self._measure(use) >= own_use:
                    giving_way.append(request)
                    continue
            del uses[largest]
        return giving_way

    def _measure(self, use: _Use, num_more_places: int = 0, num_more_blocks: int = 0) -> tuple[float, float]:
        places = (len(use.requests) + num_more_places) / self._num_places / use.weight
        blocks = (len(use.chunks) + num_more_blocks) / self._num_blocks / use.weight
        return max(places, blocks), places

    @staticmethod
    def _count(running: Iterable[Request]) -> dict[str, _Use]:
        uses: dict[str, _Use] = {}
        for request in running:
            uses.setdefault(request.tenant, _Use(request.weight)).add(request)
        return uses
