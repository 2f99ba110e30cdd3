"""What stands before the engine for every request, whichever endpoint it came through: the limits of its tenant, and its
deadline. Knows no HTTP and no Ray; the limits of a replica are its engine's own.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest
from deployments.tenants import TenantConfig

# When to come back where nobody can know, in seconds.
RETRY_AFTER_S = 1.0
REFUSED = "rate_limit_error"


class Generates(Protocol):
    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]: ...


@dataclass(slots=True)
class _Account:
    """One tenant: how many of its requests run, and the tokens that it may use, as of `refilled_s`; below 0 when more came
    out of the running ones than was left."""

    num_running: int = 0
    tokens: float = math.inf
    refilled_s: float = 0.0


class Admission:
    """Limits per tenant, of one of `num_ingress_replicas()` ingress replicas: each holds its part of a limit, so that none
    has to ask the others."""

    def __init__(
        self,
        engine: Generates,
        tenants: Sequence[TenantConfig],
        *,
        num_ingress_replicas: Callable[[], int] = lambda: 1,
        default_timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self.use(tenants)
        self._num_ingress_replicas = num_ingress_replicas
        self._default_timeout_s = default_timeout_s
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def use(self, tenants: Sequence[TenantConfig]) -> None:
        """From now on, the limits of these."""
        self._limits = {tenant.id: tenant for tenant in tenants}

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[GenerationItem, None]:
        """As the engine's; a refusal is an ErrorItem (429), and so is the end of the time (504)."""
        account = self._account(request.tenant.tenant_id)
        refusal = self._refuse(request.tenant.tenant_id, account)
        if refusal is not None:
            yield refusal
            return
        timeout_s = self._default_timeout_s if timeout_s is None else timeout_s
        deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        account.num_running += 1
        num_charged = 0
        try:
            async with aclosing(self._engine.generate(request)) as items:
                while True:
                    try:
                        async with asyncio.timeout_at(deadline_s):
                            item = await anext(items)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        message = f"the answer was not complete after {timeout_s:g} seconds; raise timeout"
                        yield ErrorItem(504, message, "timeout_error", "timeout", "timeout")
                        return
                    if isinstance(item, DeltaItem):
                        num_used = item.delta.num_prompt_tokens + item.delta.num_output_tokens
                        account.tokens -= num_used - num_charged
                        num_charged = num_used
                    yield item
        finally:
            account.num_running -= 1

    def _account(self, tenant_id: str) -> _Account:
        account = self._accounts.get(tenant_id)
        if account is None:
            account = self._accounts[tenant_id] = _Account(refilled_s=self._clock())
            if (limit := self._tokens_per_minute(tenant_id)) is not None:
                account.tokens = limit
        return account

    def _refuse(self, tenant_id: str, account: _Account) -> ErrorItem | None:
        limits = self._limits.get(tenant_id)
        if limits is None:
            return None
        if limits.max_concurrent_requests is not None:
            part = math.ceil(limits.max_concurrent_requests / self._num_ingress_replicas())
            if account.num_running >= part:
                message = (
                    f"{limits.max_concurrent_requests} requests of this tenant may run at once; wait for one to end"
                )
                return ErrorItem(429, message, REFUSED, "too_many_requests", retry_after_s=RETRY_AFTER_S)
        per_minute = self._tokens_per_minute(tenant_id)
        if per_minute is not None:
            now = self._clock()
            refill = (now - account.refilled_s) * per_minute / 60
            account.tokens = min(per_minute, account.tokens + refill)
            account.refilled_s = now
            if account.tokens <= 0:
                message = f"this tenant may use {limits.tokens_per_minute} tokens a minute; wait"
                wait_s = (1 - account.tokens) * 60 / per_minute
                return ErrorItem(429, message, REFUSED, "tokens_per_minute", retry_after_s=wait_s)
        return None

    def _tokens_per_minute(self, tenant_id: str) -> float | None:
        """This replica's part."""
        limits = self._limits.get(tenant_id)
        if limits is None or limits.tokens_per_minute is None:
            return None
        return limits.tokens_per_minute / self._num_ingress_replicas()
