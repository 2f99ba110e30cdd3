"""A limit that tenants share. Knows neither what is counted nor who the tenants are."""

from __future__ import annotations


class FairLimit:
    """Counts what each tenant holds.

    While the whole is below the limit everything is given; above it, only to a tenant that holds less than its equal part, so
    that one tenant cannot take the limit from all. The whole stays below twice the limit.
    """

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._total = 0

    def try_take(self, tenant_id: str, amount: int, limit: float) -> bool:
        """Takes all of it or nothing. What was taken is to be given back, in one piece or several.

        amount: at least 1; a tenant that holds nothing has no part.
        """
        held = self._held.get(tenant_id, 0)
        num_tenants = len(self._held) + (tenant_id not in self._held)
        if self._total + amount > limit and (held + amount) * num_tenants > limit:
            return False
        self._held[tenant_id] = held + amount
        self._total += amount
        return True

    def give_back(self, tenant_id: str, amount: int) -> None:
        self._held[tenant_id] -= amount
        self._total -= amount
        if not self._held[tenant_id]:
            del self._held[tenant_id]
