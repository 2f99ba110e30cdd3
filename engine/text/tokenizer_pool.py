"""Threads for work that is too long for an event loop: tokenising long prompts, compiling grammars.

Owns the order of that work: fair between tenants, and bounded. Knows no tokenizer; it runs what it is given.

Fairness is start-time fair queueing, as in core/waiting_queue: a tenant's virtual time is the characters that were taken
in for it, over its weight; the tenant with the smallest is next.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine.errors import EngineStoppedError, OverloadedError
from engine.tenant import Tenant

# Work on more characters than this has a thread of its own, so that the other one is never busy for long.
LONG_CHARS = 1 << 16

ResultT = TypeVar("ResultT")


@dataclass(slots=True, eq=False)
class _Job:
    """What waits to be run, for a tenant. size: in characters."""

    work: Callable[[], Any]
    tenant: Tenant
    size: int
    future: Future[Any] = field(default_factory=Future)


class TokenizerPool:
    """Two threads, one for long work and one for the rest. Call it from any event loop."""

    def __init__(
        self, max_num_waiting: int, name: str = "tokenizer", work: str = "prompts wait to be tokenised"
    ) -> None:
        """Starts nothing yet.

        max_num_waiting: for each thread.
        name: of the threads.
        work: what an error says of what waits.
        """
        self._short = _Lane(name, max_num_waiting, work)
        self._long = _Lane(f"{name}-long", max_num_waiting, work)

    async def run(self, work: Callable[[], ResultT], tenant: Tenant, num_chars: int) -> ResultT:
        """What `work` returns or raises. It is not begun if the caller is cancelled before.

        Raises OverloadedError if too many wait, EngineStoppedError after the shutdown.
        """
        lane = self._long if num_chars > LONG_CHARS else self._short
        job = _Job(work, tenant, num_chars)
        lane.submit(job)
        result: ResultT = await asyncio.wrap_future(job.future)
        return result

    def shutdown(self) -> None:
        """End what waits with EngineStoppedError, and the threads; blocks until the work that runs is done."""
        for lane in (self._short, self._long):
            lane.stop()
        for lane in (self._short, self._long):
            lane.join()


class _Lane:
    """One thread, and what waits for it. The thread begins with the first job."""

    def __init__(self, name: str, max_num_waiting: int, work: str) -> None:
        self._max_num_waiting = max_num_waiting
        self._work = work
        self._changed = threading.Condition()
        self._waiting: dict[_Job, None] = {}  # in order of arrival
        self._virtual_times: dict[str, float] = {}
        self._virtual_now = 0.0  # of the tenant that was served last
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def submit(self, job: _Job) -> None:
        with self._changed:
            if self._is_stopping:
                raise EngineStoppedError("the engine is shut down")
            if len(self._waiting) >= self._max_num_waiting:
                victim = self._find_victim(job)
                if victim is None:
                    raise OverloadedError(f"{len(self._waiting)} {self._work}; try again later")
                del self._waiting[victim]
                message = "dropped from the queue: this tenant exceeds its share of it; try again later"
                _fail(victim, OverloadedError(message))
            tenant_id = job.tenant.tenant_id
            if not any(other.tenant.tenant_id == tenant_id for other in self._waiting):  # idling earns no credit
                self._virtual_times[tenant_id] = max(self._virtual_times.get(tenant_id, 0.0), self._virtual_now)
            self._waiting[job] = None
            if not self._thread.ident:
                self._thread.start()
            self._changed.notify()
        job.future.add_done_callback(lambda _: self._forget(job))

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in waiting:
            _fail(job, EngineStoppedError("the engine is shut down"))

    def join(self) -> None:
        if self._thread.ident:
            self._thread.join()

    def _find_victim(self, newcomer: _Job) -> _Job | None:
        """The newest job of the tenant that waits with the most for its weight; None if it is the newcomer's."""
        loads = {newcomer.tenant.tenant_id: 1 / newcomer.tenant.weight}
        newest = {newcomer.tenant.tenant_id: newcomer}
        for job in self._waiting:
            tenant = job.tenant
            loads[tenant.tenant_id] = loads.get(tenant.tenant_id, 0.0) + 1 / tenant.weight
            if tenant.tenant_id != newcomer.tenant.tenant_id:
                newest[tenant.tenant_id] = job
        victim = newest[max(loads, key=lambda tenant_id: loads[tenant_id])]
        return None if victim is newcomer else victim

    def _forget(self, job: _Job) -> None:
        """It is done, or was cancelled and does not count any more."""
        with self._changed:
            self._waiting.pop(job, None)

    def _next(self) -> _Job | None:
        """Waits for it. None = the end."""
        with self._changed:
            while not self._waiting and not self._is_stopping:
                self._virtual_now, self._virtual_times = 0.0, {}  # nothing was kept waiting: all are even
                self._changed.wait()
            if self._is_stopping:
                return None
            job = min(self._waiting, key=lambda job: self._virtual_times[job.tenant.tenant_id])  # the first of equals
            del self._waiting[job]
            self._virtual_now = self._virtual_times[job.tenant.tenant_id]
            self._virtual_times[job.tenant.tenant_id] += job.size / job.tenant.weight
            return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(job.work())
            except BaseException as error:  # the caller's to handle
                job.future.set_exception(error)


def _fail(job: _Job, error: Exception) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
