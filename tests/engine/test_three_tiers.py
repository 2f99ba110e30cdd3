"""The thesis with a third tier behind the CPU tier: greedy output is that of the stateless mode.

The third tier ends its transfers late, out of order, badly or not at all.
"""

from __future__ import annotations

import random

import pytest

from engine.core.request import SamplingParams
from engine.step_loop import LookAhead
from tests.delayed_tier import NAME, dict_tier
from tests.engine.test_two_tiers import FAMILIES, WINDOW, count_ties, run_conversations
from tests.nightly import IS_NIGHTLY

COMBINATIONS = [
    (family, policy, LookAhead.LAUNCH if number % 2 else LookAhead.DRAFT)
    for number, (family, policy) in enumerate(zip(FAMILIES, ("lru", "retention_value") * 3, strict=False))
    if number < 2 or IS_NIGHTLY
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "policy", "look_ahead"), COMBINATIONS)
def test_three_tiers_tiny_equal_stateless(family, policy, look_ahead, tiny_model, make_driver):
    rng = random.Random(f"{family} {policy}")
    options = {"chunk_size": 8, "max_num_batched_tokens": 64, "max_num_seqs": 6, "max_model_len": WINDOW}
    kept = make_driver(
        tiny_model(family),
        num_gpu_blocks=40,
        num_cpu_blocks=60,
        slow_tiers=(dict_tier(150),),
        decode_reserve=0.02,
        eviction_policy=policy,
        **options,
    )
    fresh = make_driver(tiny_model(family), num_gpu_blocks=250, mode="stateless", **options)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2)
    kept.loop.look_ahead = look_ahead
    prompts = run_conversations(kept, rng, sampling)

    assert count_ties(kept, fresh, prompts, sampling) <= len(prompts) // 50
    stats = kept.core.get_statistics()
    assert all(stats["slow_transfers"].values()), stats["slow_transfers"]
    assert min(stats[f"num_{tier}_cached_tokens"] for tier in ("gpu", "cpu", NAME)) > 0
    assert min(stats["evictions"][reason] for reason in ("cpu_reclaimed", f"{NAME}_dropped")) > 0
    assert min(stats["num_aborted"], stats["num_suspensions"], stats["num_swap_ins"]) > 0
