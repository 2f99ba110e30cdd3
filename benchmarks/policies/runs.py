"""One run of the table: a workload, a size of cache, a policy, a seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from clairvoyant import Clairvoyant
from workloads import Setting

from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.tier_table import TierSpec
from engine.own_policy import load_policy
from engine.simulator.cluster import Cluster, LinkSpec
from engine.simulator.oracle import Oracle
from engine.simulator.routing import LeastLoaded
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import Roofline

CLAIRVOYANT: dict[str, Callable[..., Any]] = {
    "clairvoyant": Clairvoyant,
    "belady": partial(Clairvoyant, knows_cost=False),
}
# A disk tier, for the row with three tiers: bytes a second.
DISK_READ, DISK_WRITE = 4e9, 2e9


def run(setting: Setting, size: int, policy: str, seed: int, *, disk_tokens: int = 0) -> dict[str, float]:
    """The figures of one run. disk_tokens: of a third tier; 0 = there is none."""
    sessions = setting.sessions(seed)
    oracle = Oracle(sessions, setting.chunk_size)
    bytes_per_block = setting.model.kv_bytes_per_token * setting.chunk_size
    cost = Roofline(setting.model, setting.device, bytes_per_block)
    num_gpu_tokens, num_cpu_tokens = setting.sizes[size]
    own = partial(CLAIRVOYANT[policy], oracle=oracle) if policy in CLAIRVOYANT else load_policy(policy)
    slow, links = (), ()
    if disk_tokens:
        slow = (
            TierSpec(
                name="disk",
                num_blocks=disk_tokens // setting.chunk_size,
                is_fast=False,
                max_wait_s=10.0,
                stores_first_use=False,
                rewrite_s=3600.0,
            ),
        )
        links = (("disk", LinkSpec(DISK_READ, DISK_WRITE, 0.0005)),)
    cache = CacheConfig(
        chunk_size=setting.chunk_size,
        eviction_policy="lru" if own else policy,
        own_policy=own,
        num_gpu_blocks=num_gpu_tokens // setting.chunk_size,
        num_cpu_blocks=num_cpu_tokens // setting.chunk_size,
        cost_model=cost.cost_model(setting.chunk_size),
        slow_tiers=slow,
    )
    scheduling = SchedulingConfig(
        max_model_len=setting.window, max_num_seqs=256, max_num_batched_tokens=2048, max_num_queued_reqs=10_000
    )
    cluster = Cluster(
        make_core=lambda: EngineCore(cache, scheduling),
        cost=cost,
        router=LeastLoaded(),
        bytes_per_block=bytes_per_block,
        links=links,
    )
    began_s = time.process_time()
    outcome = Simulator(cluster, sessions, oracle=oracle).run(setting.duration_s)
    summary = outcome.summary(setting.warm_up_s)
    known = outcome.turns.column("num_known_tokens")[outcome.turns.column("sent_s") >= setting.warm_up_s]
    return {
        "recompute_s": summary.recompute_s,
        "recomputed_tokens": summary.num_recomputed_tokens,
        "known_tokens": int(known.sum()),
        "hit_rate": 1 - summary.num_recomputed_tokens / max(1, int(known.sum())),
        "turns_per_s": summary.turns_per_s,
        "first_token_p90_s": summary.first_token_p90_s,
        "s_per_token_p90": summary.s_per_token_p90,
        "num_turns": summary.num_turns,
        "busy": summary.busy,
        "suspensions": summary.num_suspensions,
        "cpu_s": time.process_time() - began_s,
    }
