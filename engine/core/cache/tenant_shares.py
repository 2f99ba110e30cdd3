"""Each tenant's part of what all tenants share, by weight. Counts nothing itself."""

from __future__ import annotations

from collections.abc import Mapping

# Tenants whose weights are remembered; of the others it counts as 1.
MAX_TENANTS = 4096


class TenantShares:
    """The weights of tenants, as their requests have told them."""

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}

    def note(self, tenant: str, weight: float) -> None:
        """The tenant has sent a request."""
        if tenant not in self._weights and len(self._weights) >= MAX_TENANTS:
            del self._weights[next(iter(self._weights))]
        self._weights[tenant] = weight

    def weight_of(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def share(self, tenant: str) -> float:
        """Its part of the whole, among all tenants that are known."""
        total = sum(self._weights.values()) + (0.0 if tenant in self._weights else 1.0)
        return self.weight_of(tenant) / total

    def is_within(self, tenant: str, num_of: Mapping[str, int], num_blocks: int) -> bool:
        """Whether a tenant holds no more than its share of `num_blocks`, among the tenants that hold some.

        num_of: blocks that each of them holds.
        """
        total = sum(map(self.weight_of, num_of.keys() | {tenant}))
        return num_of.get(tenant, 0) * total <= num_blocks * self.weight_of(tenant)
