"""What loading from a slow tier costs, as far as it is known: from the model, and from what is observed."""

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.cache.prices import LOAD_OVERHEAD, PROBE_AFTER_S, LoadPrices
from engine.core.plan import QuerySegment

# In its own units: 2, 3, 4, ... for chunks 0, 1, 2, ...
COSTS = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4, load_costs={"cpu": 0.5})


def computed(prices: LoadPrices, unit_s: float) -> None:
    """A step of 8 tokens from the start: 8 / 4 * (1 + 0.25 * 4) = 4 units."""
    prices.note_step([QuerySegment("a", 0, tuple(range(8)), samples=True)], 4 * unit_s)


def test_a_tier_of_an_unknown_price_is_always_preferred():
    prices = LoadPrices(COSTS)
    assert prices.is_loaded("disk", 0, 1)
    prices.note_load("disk", 1e9, 0.0)
    assert prices.is_loaded("disk", 0, 1), "seconds cannot be compared with other units"
    assert prices.compute_s("disk", [(0, 4)]) is None
    computed(prices, 1e-3)
    assert not prices.is_loaded("disk", 10**6, 4)


def test_seconds_and_units_are_compared_by_what_a_step_took():
    prices = LoadPrices(COSTS)
    prices.note_load("disk", 3.0 / LOAD_OVERHEAD, 0.0)
    computed(prices, 1.0)
    assert prices.load_cost("disk") == 3.0 + 0.5, "and then from the CPU tier"
    assert [prices.is_loaded("disk", position, 4) for position in range(4)] == [False, False, True, True]
    assert [prices.is_loaded("disk", 2, num_tokens) for num_tokens in (1, 3, 4)] == [False, False, True]
    assert prices.compute_cost([(0, 4), (2, 2)]) == 2.0 + 2.0
    assert prices.compute_s("disk", [(0, 4), (2, 2)]) == 4.0


def test_measured_costs_are_seconds():
    prices = LoadPrices(CostModel(1.0, 0.25, 4, load_costs={"cpu": 0.5, "disk": 2.5}, is_in_seconds=True))
    assert prices.load_cost("disk") == 2.5 * LOAD_OVERHEAD
    computed(prices, 1000.0)
    prices.note_load("disk", 3.0, 0.0)
    assert prices.load_cost("disk") == 3.0 * LOAD_OVERHEAD + 0.5


def test_new_observations_count_more_than_old_ones():
    prices = LoadPrices(CostModel(1.0, 0.25, 4, is_in_seconds=True))
    prices.note_load("disk", 1.0, 0.0)
    for _ in range(100):
        prices.note_load("disk", 2.0, 0.0)
    assert prices.load_cost("disk") == pytest.approx(2.0 * LOAD_OVERHEAD, abs=0.02)
    for _ in range(100):
        prices.note_load("disk", 1.0, 0.0)
    assert prices.load_cost("disk") == pytest.approx(LOAD_OVERHEAD, abs=0.02)


def decoded(prices: LoadPrices, seconds: float) -> None:
    prices.note_step([QuerySegment(f"r{i}", 10, None, samples=True) for i in range(7)], seconds)


def test_decodes_alone_tell_nothing_of_what_a_prompt_costs():
    prices = LoadPrices(COSTS)
    prices.note_load("disk", 3.0, 0.0)
    decoded(prices, 100.0)
    assert prices.load_cost("disk") == 0.0


def test_what_a_step_takes_in_any_case_is_no_price_of_computing():
    prices = LoadPrices(COSTS)
    prices.note_load("disk", 3.0 / LOAD_OVERHEAD, 0.0)
    decoded(prices, 2.0)
    prices.note_step([QuerySegment("a", 0, tuple(range(8)), samples=True)], 6.0)  # 4 units
    assert prices.load_cost("disk") == 3.0 + 0.5
    for _ in range(100):
        decoded(prices, 1.0)
        prices.note_step([QuerySegment("a", 0, tuple(range(8)), samples=True)], 5.0)
    assert prices.load_cost("disk") == pytest.approx(3.5, abs=0.01)
    decoded(prices, 1000.0)  # held up
    prices.note_step([QuerySegment("a", 0, tuple(range(8)), samples=True)], 5.0)
    assert prices.load_cost("disk") == pytest.approx(3.5, abs=0.01), "less than that takes no step"


def test_an_old_price_is_looked_at_again():
    prices = LoadPrices(COSTS)
    assert not prices.needs_probe("disk", 1000.0), "nothing was observed yet"
    prices.note_load("disk", 1.0, 1000.0)
    assert not prices.needs_probe("disk", 1000.0 + PROBE_AFTER_S)
    assert prices.needs_probe("disk", 1001.0 + PROBE_AFTER_S)


def test_what_a_token_costs_is_told_in_seconds():
    prices = LoadPrices(COSTS)
    assert (prices.token_compute_s, prices.token_load_s("peer")) == (None, None)
    computed(prices, 1.0)
    first_s, slope_s = prices.token_compute_s
    num_tokens, seconds = 4096, 0.0
    for position in range(num_tokens // COSTS.chunk_size):
        seconds += COSTS.chunk_cost(position)
    assert first_s == COSTS.constant / COSTS.chunk_size
    assert num_tokens * (first_s + slope_s * num_tokens / 2) == pytest.approx(seconds, rel=0.01)
    prices.note_load("peer", 3.0, 0.0)
    assert prices.token_load_s("peer") == 3.0 / COSTS.chunk_size
