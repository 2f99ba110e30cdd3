"""Which chunks of the CPU tier are loaded and which computed again.

Judged by what the whole context costs, against all ways to split it, and on the figures of real models.
"""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.cache.cache_manager import CacheManager
from engine.core.cache.cost_model import CostModel
from engine.core.config import CacheConfig
from engine.core.request import Request, SamplingParams
from engine.core.stats import EngineStats


def cache_in_cpu_tier(costs: CostModel, *contexts: list[int]) -> CacheManager:
    """A cache that has each context in the CPU tier alone, from its first chunk to its tail."""
    num_blocks = sum(len(context) // costs.chunk_size + 1 for context in contexts)
    config = CacheConfig(
        chunk_size=costs.chunk_size, num_gpu_blocks=num_blocks, num_cpu_blocks=2 * num_blocks, cost_model=costs
    )
    cache = CacheManager(config, EngineStats())
    for number, context in enumerate([*contexts, [-1 % 2**32] * (num_blocks * costs.chunk_size - 1)]):
        request = Request(f"r{number}", context, SamplingParams(), conversation_id=f"c{number}")
        assert cache.try_admit(request, 0, 1.0)
        cache.transfers.take()
        cache.transfers.complete()
        cache.commit(request, 0, len(context))
        cache.release(request, 1.0 + number)
    return cache


def admit(cache: CacheManager, number: int, context: list[int]) -> tuple[Request, set[int]]:
    """The conversation goes on with one token; returns the request and the positions of the chunks that are loaded."""
    request = Request(f"again {number}", [*context, 7], SamplingParams(), conversation_id=f"c{number}")
    num_queued = len(cache.transfers.planned.swap_ins)
    assert cache.try_admit(request, 0, 99.0)
    return request, {target.position for _, target, _ in cache.transfers.planned.swap_ins[num_queued:]}


# Quarters, so that sums are exact.
quarters = st.integers(0, 40).map(lambda number: number / 4)


@settings(max_examples=150, deadline=None)
@given(
    num_tokens=st.integers(1, 27),
    num_other_tokens=st.integers(0, 20),
    constant=quarters,
    per_context_token=st.integers(0, 4).map(lambda number: number / 16),
    load=quarters,
)
def test_no_other_split_costs_less_and_none_takes_half_as_long(
    num_tokens: int, num_other_tokens: int, constant: float, per_context_token: float, load: float
) -> None:
    """Whatever else is loaded in the same step."""
    costs = CostModel(constant, per_context_token, chunk_size=4, load_costs={"cpu": load})
    context, other = list(range(100, 100 + num_tokens)), list(range(500, 500 + num_other_tokens))
    cache = cache_in_cpu_tier(costs, context, *[other] * bool(other))
    num_queued = len(admit(cache, 1, other)[1]) if other else 0
    request, loaded = admit(cache, 0, context)
    assert request.pending[-1][1] == num_tokens + 1

    sizes = {position: min(4, num_tokens - 4 * position) for position in range(-(-num_tokens // 4))}
    compute = {position: costs.chunk_cost(position) * size / 4 for position, size in sizes.items()}

    def sums(loads: set[int]) -> tuple[float, float]:
        """What is computed, and what is loaded, the queue in front included."""
        return sum(compute[p] for p in sizes if p not in loads), load * (num_queued + len(loads))

    splits = [sums({p for p, is_in in enumerate(choice) if is_in}) for choice in product([0, 1], repeat=len(sizes))]
    ours = sums(loaded)
    assert sum(ours) == min(map(sum, splits))
    assert max(ours) <= 2 * min(map(max, splits))
    # And the account says so.
    assert request.account.loaded_tokens.get("cpu", 0) == sum(sizes[p] for p in loaded)
    assert request.account.num_not_loaded_tokens == sum(sizes[p] for p in sizes if p not in loaded)


def line_through(rates: dict[int, float], load_s: float) -> CostModel:
    """From tokens computed per second at two context lengths, in seconds per chunk of 32."""
    (short, fast), (long, slow) = rates.items()
    slope = (32 / slow - 32 / fast) / (long - short)
    return CostModel(32 / fast - slope * short, slope, chunk_size=32, load_costs={"cpu": load_s})


EIGHT_B_ON_AN_H100 = line_through({2048: 26_800, 32768: 18_000}, load_s=4 * 2**20 / 50e9)
HUNDRED_M_ON_A_CPU = line_through({128: 1_090, 4096: 598}, load_s=0.46e-3)
THIRTEEN_B_ON_AN_A100 = line_through({2048: 5_300, 32768: 3_600}, load_s=25 * 2**20 / 24e9)


@pytest.mark.parametrize("costs", [EIGHT_B_ON_AN_H100, HUNDRED_M_ON_A_CPU, THIRTEEN_B_ON_AN_A100])
def test_what_loads_faster_than_it_computes_is_never_computed_again(costs: CostModel) -> None:
    """8,192 tokens in the CPU tier: each of the 256 chunks takes 5 to 100 times as long to compute as to load."""
    assert 4 * costs.load_costs["cpu"] < costs.chunk_cost(0)
    context = list(range(8192))
    cache = cache_in_cpu_tier(costs, context)
    request, loaded = admit(cache, 0, context)
    assert loaded == set(range(256))
    assert request.pending == [(8192, 8193)]
    assert request.account.num_not_loaded_tokens == 0


def test_a_bus_that_is_slower_than_the_processor_at_the_front_only() -> None:
    """At 3.2 GB/s a block of the 8B model takes 1.31 ms: as long as a chunk at 8,100 tokens of context."""
    costs = line_through({2048: 26_800, 32768: 18_000}, load_s=4 * 2**20 / 3.2e9)
    cut = next(position for position in range(1024) if costs.chunk_cost(position) >= costs.load_costs["cpu"])
    assert 200 < cut < 300
    context = list(range(16384))
    request, loaded = admit(cache_in_cpu_tier(costs, context), 0, context)
    assert loaded == set(range(cut, 512))
    assert request.pending == [(0, 32 * cut), (16384, 16385)]


def test_a_short_tail_is_computed_although_a_full_chunk_would_be_loaded() -> None:
    """A block is loaded whole: 2 for 2 tokens that cost 1.5 to compute, but also for 4 that cost 2."""
    costs = CostModel(constant=2.0, per_context_token=0.125, chunk_size=4, load_costs={"cpu": 2.0})
    context = list(range(6))
    request, loaded = admit(cache_in_cpu_tier(costs, context), 0, context)
    assert loaded == {0}
    assert request.pending == [(4, 7)]
