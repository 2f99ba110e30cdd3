"""Requests that wait to be admitted: in order of arrival within a tenant, weighted fair between tenants.

Owns their order; knows no cache and no step.

Fairness is start-time fair queueing (Goyal, Vin, Cheng 1996): each tenant has a virtual time, the tokens computed for it
over its weight, and the tenant with the smallest is next. A tenant that comes back from idling starts at the smallest virtual
time of those that wait or run, so that idling earns no credit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Set
from itertools import takewhile

from engine.core.request import Request


class WaitingQueue:
    """The waiting requests of all tenants; with one tenant the order is that of arrival.

    Requests whose turn had come before (suspended ones, and those that waited for a slow tier) are in front of their tenant's
    others.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._by_tenant: dict[str, deque[Request]] = {}
        self._had_turn: set[Request] = set()  # the first ones of their tenants
        self._virtual_times: dict[str, float] = {}
        self._virtual_now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._by_tenant.values()))

    def __iter__(self) -> Iterator[Request]:
        for queue in self._by_tenant.values():
            yield from queue

    @property
    def num_tenants(self) -> int:
        """Tenants that have waiting requests."""
        return len(self._by_tenant)

    def append(self, request: Request, running_tenants: Set[str] = frozenset()) -> None:
        """A request that has arrived is the last one of its tenant. running_tenants: those that have running requests."""
        tenant, now = request.tenant, self._virtual_now
        if tenant not in self._by_tenant:
            others = self._by_tenant.keys() | running_tenants
            if tenant not in others:
                now = min((self._virtual_times.get(other, now) for other in others), default=now)
            self._by_tenant[tenant] = deque()
            self._virtual_times[tenant] = max(self._virtual_times.get(tenant, now), now)
        self._by_tenant[tenant].append(request)
        self.num_tokens += request.num_tokens

    def put_back(self, request: Request) -> None:
        """A request that was running is the next one of its tenant again."""
        self._insert(0, request)

    def put_back_in_order(self, request: Request) -> None:
        """A request whose turn had come is the next one of its tenant again, behind those of them that arrived earlier."""
        queue = self._by_tenant.get(request.tenant, ())
        earlier = takewhile(lambda other: other in self._had_turn and other.arrival_s <= request.arrival_s, queue)
        self._insert(sum(1 for _ in earlier), request)

    def _insert(self, index: int, request: Request) -> None:
        self._had_turn.add(request)
        self._by_tenant.setdefault(request.tenant, deque()).insert(index, request)
        self._virtual_times.setdefault(request.tenant, self._virtual_now)
        self.num_tokens += request.num_tokens

    def peek(self) -> Request | None:
        """Whose turn it is."""
        tenant = min(
            self._by_tenant,
            key=lambda tenant: (self._virtual_times[tenant], self._by_tenant[tenant][0].arrival_s),
            default=None,
        )
        return None if tenant is None else self._by_tenant[tenant][0]

    def remove(self, request: Request) -> None:
        """Take a request out, next or not."""
        self.num_tokens -= request.num_tokens
        queue = self._by_tenant[request.tenant]
        queue.remove(request)
        self._had_turn.discard(request)
        if not queue:
            del self._by_tenant[request.tenant]

    def serve(self, request: Request, num_tokens: int) -> None:
        """The next request is taken out and `num_tokens` will be computed for it at first."""
        self._virtual_now = self._virtual_times[request.tenant]
        self.charge(request, num_tokens)
        self.remove(request)
        if not self._by_tenant:  # no request was kept waiting: all tenants are even
            self._virtual_now = max(self._virtual_times.values(), default=self._virtual_now)
        # A tenant that has no waiting request and is not ahead starts from the same virtual time without an entry.
        for tenant, virtual_time in list(self._virtual_times.items()):
            if virtual_time <= self._virtual_now and tenant not in self._by_tenant:
                del self._virtual_times[tenant]

    def charge(self, request: Request, num_tokens: int) -> None:
        """`num_tokens` more are computed for the request."""
        virtual_time = self._virtual_times.get(request.tenant, self._virtual_now)
        self._virtual_times[request.tenant] = virtual_time + num_tokens / request.weight

    def charge_steps(self, request: Request, num_steps: int) -> None:
        """One more token is computed for the request in each of so many steps; equal to that many calls of `charge`."""
        virtual_time = self._virtual_times.get(request.tenant, self._virtual_now)
        part = 1 / request.weight
        if part == 1.0 and virtual_time.is_integer():  # then the sum is exact
            virtual_time += num_steps
        else:
            for _ in range(num_steps):
                virtual_time += part
        self._virtual_times[request.tenant] = virtual_time

    def find_victim(self, newcomer: Request) -> Request | None:
        """The request to shed for `newcomer` if the queue is full.

        It is the newest one of the tenant with the most waiting for its weight. None if the newcomer's own tenant
        would then be that one: the newcomer has to go. Requests whose turn had come are never shed, and do not count.
        """
        loads = {tenant: self._count_arrived(queue) / queue[-1].weight for tenant, queue in self._by_tenant.items()}
        own_load = loads.get(newcomer.tenant, 0.0) + 1.0 / newcomer.weight
        tenant = max(loads, key=lambda tenant: loads[tenant], default=None)
        if tenant is None or tenant == newcomer.tenant or loads[tenant] <= own_load:
            return None
        return self._by_tenant[tenant][-1]

    def _count_arrived(self, queue: deque[Request]) -> int:
        """Requests that have not been admitted yet; they are behind the suspended ones."""
        return sum(1 for _ in takewhile(lambda request: request not in self._had_turn, reversed(queue)))
