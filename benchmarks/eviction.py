"""Microseconds per victim of the retention-value search, by number of chunks.

Target: under 20 us at a million chunks, and no growth with their number.

    python benchmarks/eviction.py
"""

from __future__ import annotations

import random
import time

from machine import write_result
from tqdm import tqdm

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import EVICTION_POLICIES, make_policy
from engine.core.cache.index import Chunk

NUM_POSITIONS = 512  # 16k tokens in chunks of 32
NUM_VICTIMS = 20_000
SIZES = (10_000, 100_000, 1_000_000)


def measure(policy_name: str, num_chunks: int) -> dict[str, float]:
    """Steady state: each victim is replaced by a chunk that was just used, as in a full cache."""
    rng = random.Random(0)
    policy = make_policy(policy_name, CostModel(constant=1.0, per_context_token=1 / 4096))
    chunks = []
    for i in range(num_chunks):
        chunk = Chunk(int(NUM_POSITIONS * rng.random() ** 2), [])
        chunk.last_active = i * 1e-3
        chunks.append(chunk)
    start = time.perf_counter()
    for chunk in chunks:
        policy.insert(chunk)
    insert_s = time.perf_counter() - start
    now = num_chunks * 1e-3
    start = time.perf_counter()
    for _ in range(NUM_VICTIMS):
        now += 1e-3
        victim = policy.choose_victim(now)
        assert victim is not None
        policy.remove(victim)
        victim.last_active = now
        policy.insert(victim)
    victim_s = time.perf_counter() - start
    return {"insert_us": insert_s / num_chunks * 1e6, "victim_us": victim_s / NUM_VICTIMS * 1e6}


def main() -> None:
    rows = [
        {"policy": policy, "num_chunks": size, **measure(policy, size)}
        for policy in tqdm(EVICTION_POLICIES, desc="policies")
        for size in SIZES
    ]
    print(f"{'policy':<16} {'chunks':>9} {'insert':>10} {'victim':>10}   (victim: choose, remove, insert again)")
    for row in rows:
        print(f"{row['policy']:<16} {row['num_chunks']:>9} {row['insert_us']:>7.2f} us {row['victim_us']:>7.2f} us")
    write_result("eviction", {"num_positions": NUM_POSITIONS, "rows": rows})


if __name__ == "__main__":
    main()
