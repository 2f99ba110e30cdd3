"""The limits of a tenant, and the deadline of a request, before the engine or the store sees it.

The same for every endpoint. A replica's limits are enforced by its engine, the quota of what a tenant keeps by the
store. Knows no HTTP and no Ray.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from deployments.errors import (
    AnswerTimeoutError,
    TenantLimitError,
    TooManyRequestsError,
    TooManyStoreBytesError,
    TooManyStoreRequestsError,
    TooManyTokensError,
)
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest
from deployments.store.values import NO_STORE_LIMITS, Quota, StoreLimits
from deployments.tenants import TenantConfig
from engine.text.prompt import TokenPrompt

# When to come back if it cannot be known, in seconds.
RETRY_AFTER_S = 1.0
# What is set aside for a request until its tokens are counted: characters of a token, and an answer without max_tokens.
CHARS_PER_TOKEN = 4
UNSTATED_ANSWER_TOKENS = 512


class Generates(Protocol):
    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]: ...


@dataclass(slots=True)
class _Bucket:
    """How much of something may be used now, as of `refilled_s`; infinite until it is first asked for.

    Below 0, the rest is owed: if there is anything, a request may take all that it needs, so that none is too large for
    ever.
    """

    level: float = math.inf
    refilled_s: float = 0.0

    def refill(self, now: float, per_minute: float) -> None:
        """No more than a minute's worth is saved up."""
        self.level = min(per_minute, self.level + (now - self.refilled_s) * per_minute / 60)
        self.refilled_s = now

    def is_empty(self) -> bool:
        return self.level <= 0


def _wait_s(level: float, per_minute: float) -> float:
    """Until there is something again."""
    return (1 - level) * 60 / per_minute


@dataclass(slots=True)
class _Account:
    """One tenant: how many of its requests run, and what it may use.

    num_reserved: of the tokens taken, those set aside for answers that are not there yet.
    """

    num_running: int = 0
    tokens: _Bucket = field(default_factory=_Bucket)
    num_reserved: int = 0
    store_requests: _Bucket = field(default_factory=_Bucket)
    store_bytes: _Bucket = field(default_factory=_Bucket)


@dataclass(slots=True)
class _Charge:
    """What one running request has taken from its account, and what of that it has used."""

    account: _Account
    num_taken: int = 0
    num_used: int = 0

    def settle(self, num_taken: int, num_used: int) -> None:
        more = num_taken - self.num_taken
        self.account.tokens.level -= more
        self.account.num_reserved += more - (num_used - self.num_used)
        self.num_taken, self.num_used = num_taken, num_used


class Admission:
    """The limits of each tenant in one of `num_ingress_replicas()` ingress replicas.

    Each replica has its part of a limit, so that none has to ask the others.

    store_limits: for tenants whose own entries do not say otherwise.
    """

    def __init__(
        self,
        engine: Generates,
        tenants: Sequence[TenantConfig],
        store_limits: StoreLimits = NO_STORE_LIMITS,
        *,
        num_ingress_replicas: Callable[[], int] = lambda: 1,
        default_timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self.use(tenants)
        self._store_limits = store_limits
        self._num_ingress_replicas = num_ingress_replicas
        self._default_timeout_s = default_timeout_s
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def use(self, tenants: Sequence[TenantConfig]) -> None:
        """From now on, the limits of these."""
        self._limits = {tenant.id: tenant for tenant in tenants}

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None = None, *, admitted_s: float | None = None
    ) -> AsyncGenerator[GenerationItem, None]:
        """The engine's items; a rejection is an ErrorItem, and so is the end of the time.

        The request's tokens are taken from the tenant's account at once, the answer's by max_tokens; unused ones come
        back at the end.

        admitted_s: when `refusal` let the whole pass of which this is a part, by the event loop's clock: it is not refused
            now, and its time began then. None = it is a whole.
        """
        refusal = None if admitted_s is not None else self.refusal(request.tenant.tenant_id)
        if refusal is not None:
            yield refusal
            return
        account = self._account(request.tenant.tenant_id)
        timeout_s = self._default_timeout_s if timeout_s is None else timeout_s
        start_s = asyncio.get_running_loop().time() if admitted_s is None else admitted_s
        deadline_s = None if timeout_s is None else start_s + timeout_s
        account.num_running += 1
        charge = _Charge(account)
        num_answer = request.sampling.max_tokens or UNSTATED_ANSWER_TOKENS
        charge.settle(_num_prompt_tokens(request) + num_answer, 0)
        try:
            async with aclosing(self._engine.generate(request)) as items:
                while True:
                    try:
                        async with asyncio.timeout_at(deadline_s):
                            item = await anext(items)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        message = f"the answer was not complete after {timeout_s:g} seconds; give a larger timeout"
                        yield ErrorItem.of(AnswerTimeoutError(message, "timeout"))
                        return
                    if isinstance(item, DeltaItem):
                        num_prompt, num_output = item.delta.num_prompt_tokens, item.delta.num_output_tokens
                        charge.settle(num_prompt + max(num_answer, num_output), num_prompt + num_output)
                    yield item
        finally:
            charge.settle(charge.num_used, charge.num_used)
            account.num_running -= 1

    def refusal(self, tenant_id: str) -> ErrorItem | None:
        """Why a request of this tenant would be rejected now. Takes nothing."""
        limits = self._limits.get(tenant_id)
        if limits is None:
            return None
        account = self._account(tenant_id)
        if self.num_places(tenant_id) <= 0:
            message = f"this tenant may run {limits.max_concurrent_requests} requests at once; wait for one to finish"
            return ErrorItem.of(TooManyRequestsError(message))
        if limits.tokens_per_minute is not None:
            per_minute = limits.tokens_per_minute / self._num_ingress_replicas()
            account.tokens.refill(self._clock(), per_minute)
            if account.tokens.is_empty():
                message = (
                    f"this tenant may use {limits.tokens_per_minute} tokens a minute, and running requests count with their "
                    "max_tokens; try again later"
                )
                settled = account.tokens.level + account.num_reserved
                wait_s = RETRY_AFTER_S if settled > 0 else _wait_s(settled, per_minute)
                return ErrorItem.of(TooManyTokensError(message, retry_after_s=wait_s))
        return None

    def num_places(self, tenant_id: str) -> float:
        """How many more requests of this tenant may run now; infinite without a limit."""
        limits = self._limits.get(tenant_id)
        if limits is None or limits.max_concurrent_requests is None:
            return math.inf
        part = math.ceil(limits.max_concurrent_requests / self._num_ingress_replicas())
        return part - self._account(tenant_id).num_running

    def admit_storing(self, tenant_id: str, num_bytes: int) -> None:
        """Counts a request to a path that only stores. Raises TenantLimitError, and then counts nothing."""
        limits, account = self._store_limits_of(tenant_id), self._account(tenant_id)
        buckets: list[tuple[_Bucket, int | None, int, str, type[TenantLimitError]]] = [
            (account.store_requests, limits.requests_per_minute, 1, "requests", TooManyStoreRequestsError),
            (account.store_bytes, limits.bytes_per_minute, num_bytes, "bytes", TooManyStoreBytesError),
        ]
        for bucket, limit, _, what, kind in buckets:
            if limit is None:
                continue
            per_minute = limit / self._num_ingress_replicas()
            bucket.refill(self._clock(), per_minute)
            if bucket.is_empty():
                raise kind(
                    f"this tenant may send {limit} {what} a minute to endpoints that only store; try again later",
                    retry_after_s=_wait_s(bucket.level, per_minute),
                )
        for bucket, _, amount, _, _ in buckets:
            bucket.level -= amount

    def quota_of(self, tenant_id: str) -> Quota:
        """What this tenant may keep."""
        return self._store_limits_of(tenant_id).quota

    def _account(self, tenant_id: str) -> _Account:
        return self._accounts.setdefault(tenant_id, _Account())

    def _store_limits_of(self, tenant_id: str) -> StoreLimits:
        own, others = self._limits.get(tenant_id), self._store_limits
        if own is None:
            return others
        return StoreLimits(
            Quota(
                _first(own.max_stored_rows, others.quota.max_rows), _first(own.max_stored_bytes, others.quota.max_bytes)
            ),
            _first(own.store_requests_per_minute, others.requests_per_minute),
            _first(own.store_bytes_per_minute, others.bytes_per_minute),
        )


def _first(own: int | None, other: int | None) -> int | None:
    return other if own is None else own


def _num_prompt_tokens(request: GenerationRequest) -> int:
    """About how many, until the engine has counted them."""
    prompt = request.prompt
    return len(prompt.token_ids) if isinstance(prompt, TokenPrompt) else prompt.num_chars // CHARS_PER_TOKEN
