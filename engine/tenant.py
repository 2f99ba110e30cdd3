"""Who a request belongs to. Plain data; who may call himself a tenant, the HTTP side decides."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """A user of the engine. Tenants share no chunk, no conversation and no id.

    weight: its share of the engine, relative to others', when tenants want more than there is.
    """

    tenant_id: str
    weight: float = 1.0


LOCAL_TENANT = Tenant("local")
