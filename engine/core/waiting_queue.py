"""Requests that wait to be admitted: first come, first served within a tenant, weighted fair between tenants. Owns their
order; knows no cache and no step.

Fairness is start-time fair queueing (Goyal, Vin, Cheng 1996): each tenant has a virtual time, the tokens computed for it
over its weight, and the tenant with the smallest is next. A tenant that comes back from idling starts at the virtual time
of whoever is being served, so that idling earns no credit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from engine.core.request import Request


class WaitingQueue:
    """Suspended requests are in front of all others: they gave up their blocks for somebody older. With one tenant the order
    is that of arrival."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._suspended: deque[Request] = deque()
        self._by_tenant: dict[str, deque[Request]] = {}
        self._virtual_times: dict[str, float] = {}
        self._virtual_now = 0.0

    def __len__(self) -> int:
        return len(self._suspended) + sum(map(len, self._by_tenant.values()))

    def __iter__(self) -> Iterator[Request]:
        yield from self._suspended
        for queue in self._by_tenant.values():
            yield from queue

    def append(self, request: Request) -> None:
        if request.tenant not in self._by_tenant:
            self._by_tenant[request.tenant] = deque()
            self._virtual_times[request.tenant] = max(self._virtual_times.get(request.tenant, 0.0), self._virtual_now)
        self._by_tenant[request.tenant].append(request)
        self.num_tokens += request.num_tokens

    def put_back(self, request: Request) -> None:
        """A request that was running is the next one again."""
        self._suspended.appendleft(request)
        self.num_tokens += request.num_tokens

    def peek(self) -> Request | None:
        """Who is next."""
        if self._suspended:
            return self._suspended[0]
        tenant = min(
            self._by_tenant,
            key=lambda tenant: (self._virtual_times[tenant], self._by_tenant[tenant][0].arrival_s),
            default=None,
        )
        return None if tenant is None else self._by_tenant[tenant][0]

    def remove(self, request: Request) -> None:
        """Take a request out, next or not."""
        self.num_tokens -= request.num_tokens
        if request in self._suspended:
            self._suspended.remove(request)
            return
        queue = self._by_tenant[request.tenant]
        queue.remove(request)
        if not queue:
            del self._by_tenant[request.tenant]

    def serve(self, request: Request, num_tokens: int) -> None:
        """The next request is taken out and `num_tokens` will be computed for it at first."""
        if request not in self._suspended:
            self._virtual_now = self._virtual_times[request.tenant]
            self.charge(request, num_tokens)
        self.remove(request)
        if not self._by_tenant:  # nobody was kept waiting: all are even
            self._virtual_now = max(self._virtual_times.values(), default=self._virtual_now)
        # Whoever does not wait and is not ahead would start from the same virtual time without an entry.
        for tenant, virtual_time in list(self._virtual_times.items()):
            if virtual_time <= self._virtual_now and tenant not in self._by_tenant:
                del self._virtual_times[tenant]

    def charge(self, request: Request, num_tokens: int) -> None:
        """`num_tokens` more are computed for the request."""
        virtual_time = self._virtual_times.get(request.tenant, self._virtual_now)
        self._virtual_times[request.tenant] = virtual_time + num_tokens / request.weight

    def find_victim(self, newcomer: Request) -> Request | None:
        """Who has to go for `newcomer` where there is no more room to wait: the newest request of the tenant that waits with
        the most for its weight. None where the newcomer's own tenant would then be that: it is the newcomer who has to go.
        Suspended requests never are."""
        loads = {tenant: len(queue) / queue[-1].weight for tenant, queue in self._by_tenant.items()}
        own_load = loads.get(newcomer.tenant, 0.0) + 1.0 / newcomer.weight
        tenant = max(loads, key=lambda tenant: loads[tenant], default=None)
        if tenant is None or tenant == newcomer.tenant or loads[tenant] <= own_load:
            return None
        return self._by_tenant[tenant][-1]
