"""The policies by their names in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction.hinted import HintedRetention
from engine.core.cache.eviction.lru import LRU, TrailingLRU
from engine.core.cache.eviction.policy import EvictionPolicy, ReuseObserver
from engine.core.cache.eviction.retention_value import RetentionValue
from engine.core.cache.eviction.tail_optimised import TailOptimisedLRU
from engine.core.cache.tenant_shares import TenantShares
from engine.errors import ConfigError

# By the name in the configuration; what makes one from the cost model.
POLICIES: dict[str, Callable[[CostModel], EvictionPolicy]] = {
    "retention_value": RetentionValue,
    "lru": lambda cost_model: LRU(),
    "trailing_lru": lambda cost_model: TrailingLRU(),
    "tail_optimised_lru": TailOptimisedLRU,
}
EVICTION_POLICIES = tuple(POLICIES)


# Of these, the ones that know nothing of hints; and what takes the place of the one that has a form for them.
WITHOUT_HINTS = ("lru", "trailing_lru", "tail_optimised_lru")
HINTED = "retention_value"


def make_policy(name: str, cost_model: CostModel, shares: TenantShares | None = None) -> EvictionPolicy:
    """A policy by its name in the configuration.

    shares: of the tenants, if the policy has to go by hints; None = there are none.

    Raises ConfigError.
    """
    if name not in POLICIES:
        raise ConfigError(
            f"eviction_policy must be one of {', '.join(POLICIES)}, got {name!r}", param="eviction_policy"
        )
    if shares is not None and name in WITHOUT_HINTS:
        raise ConfigError(
            f"eviction_policy {name} does not go by hints; set kv_hints to off, or eviction_policy to {HINTED}",
            param="kv_hints",
        )
    return HintedRetention(cost_model, shares) if shares is not None and name == HINTED else POLICIES[name](cost_model)


def make_policies(
    name: str,
    own: Callable[[CostModel], EvictionPolicy] | None,
    cost_model: CostModel,
    shares: TenantShares | None = None,
) -> tuple[Callable[[], EvictionPolicy], ReuseObserver | None]:
    """What makes the policies of all tiers; and what they learn from, if they do, which wants to be told of requests.

    own: what makes the policy, if it is none of the named ones. shares: see make_policy.

    Raises ConfigError.
    """
    if own is None:
        return partial(make_policy, name, cost_model, shares), None
    factory: Any = own
    if not hasattr(factory, "LEARNS_FROM"):
        return partial(factory, cost_model), None
    observer: ReuseObserver = factory.LEARNS_FROM()
    return partial(factory, cost_model, observer), observer
