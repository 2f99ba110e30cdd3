"""Which chunk is evicted first.

A policy holds the chunks that may go and promises the exact order of its victims; the cache decides when to ask, and what
happens to a victim. One policy a file; `registry` has their names.
"""

from engine.core.cache.eviction.hinted import HintedRetention
from engine.core.cache.eviction.lru import LRU, TrailingLRU
from engine.core.cache.eviction.policy import EvictionPolicy, ReuseObserver
from engine.core.cache.eviction.registry import EVICTION_POLICIES, POLICIES, make_policies, make_policy
from engine.core.cache.eviction.retention_value import RetentionValue
from engine.core.cache.eviction.tail_optimised import TailOptimisedLRU

__all__ = [
    "EVICTION_POLICIES",
    "LRU",
    "POLICIES",
    "EvictionPolicy",
    "HintedRetention",
    "RetentionValue",
    "ReuseObserver",
    "TailOptimisedLRU",
    "TrailingLRU",
    "make_policies",
    "make_policy",
]
