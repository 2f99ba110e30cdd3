"""The policies by their names in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction.lru import LRU, TrailingLRU
from engine.core.cache.eviction.policy import EvictionPolicy
from engine.core.cache.eviction.retention_value import RetentionValue
from engine.errors import ConfigError

# By the name in the configuration; what makes one from the cost model.
POLICIES: dict[str, Callable[[CostModel], EvictionPolicy]] = {
    "retention_value": RetentionValue,
    "lru": lambda cost_model: LRU(),
    "trailing_lru": lambda cost_model: TrailingLRU(),
}
EVICTION_POLICIES = tuple(POLICIES)


def make_policy(name: str, cost_model: CostModel) -> EvictionPolicy:
    """A policy by its name in the configuration. Raises ConfigError."""
    if name not in POLICIES:
        raise ConfigError(
            f"eviction_policy must be one of {', '.join(POLICIES)}, got {name!r}", param="eviction_policy"
        )
    return POLICIES[name](cost_model)
