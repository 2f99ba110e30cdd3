"""The thesis with both tiers tiny: greedy output is that of the stateless mode.

That holds whatever was swapped, dropped, loaded, copied, preempted or aborted on the way.
"""

from __future__ import annotations

import random

import pytest
import torch

from engine.core.executor_protocol import ComputationFailedError
from engine.core.request import SamplingParams
from engine.step_loop import LookAhead
from tests.nightly import IS_NIGHTLY

# Enough of them for all tiers to be too small; each has turns enough for its history to outgrow the window.
NUM_CONVERSATIONS = 40 if IS_NIGHTLY else 24
NUM_TURNS = 8
TIE = 1e-4
WINDOW = 256
FAMILIES = ("llama", "gpt2", "opt", "gemma2", "mistral")
POLICIES = ("retention_value", "lru", "trailing_lru")
CHUNK_SIZES = (4, 16, 32)
# All combinations take minutes: nightly. In CI each family meets two policies, and each policy each chunk size.
COMBINATIONS = [
    (family, policy, chunk_size)
    for i, family in enumerate(FAMILIES)
    for j, policy in enumerate(POLICIES)
    for k, chunk_size in enumerate(CHUNK_SIZES)
    if (k == (i + j) % 3 and j != i % 3) or IS_NIGHTLY
]


def run_conversations(driver, rng: random.Random, sampling: SamplingParams) -> dict[str, list[int]]:
    """Random interleaving of conversations with forks and aborts; returns the prompts of the requests that ended well."""
    vocabulary = range(3, 250)
    system_prompt = rng.choices(vocabulary, k=21)
    histories = {f"c{i}": system_prompt[:] for i in range(NUM_CONVERSATIONS)}
    turns_left = dict.fromkeys(histories, NUM_TURNS)
    running: dict[str, str] = {}  # request id -> conversation id
    prompts: dict[str, list[int]] = {}
    latest = "c0"
    while any(turns_left.values()) or running or driver.loop.in_flight:
        idle = [c for c in histories if turns_left[c] and c not in running.values()]
        if idle and rng.random() < 0.6:
            conversation = rng.choice(idle)
            request_id = f"{conversation}.{turns_left[conversation]}"
            if rng.random() < 0.1:
                histories[conversation] = histories[rng.choice([latest, rng.choice(list(histories))])][:]
            if len(histories[conversation]) > WINDOW - 40:
                histories[conversation] = histories[conversation][: WINDOW // 2]
            histories[conversation] = histories[conversation] + rng.choices(vocabulary, k=rng.randint(1, 20))
            prompts[request_id] = histories[conversation][:]
            driver.add(request_id, prompts[request_id], conversation, sampling)
            turns_left[conversation] -= 1
            running[request_id] = conversation
        if driver.slow_tier is not None and rng.random() < 0.05:
            driver.slow_tier.wake()  # as long as a transfer hangs, the tier is left alone
        victim = rng.choice(list(running)) if running and rng.random() < 0.03 else None
        in_flight = rng.random() < 0.5
        for output in driver.step(victim if in_flight else None):
            if output.finish_reason is not None:
                latest = running.pop(output.request_id)
                histories[latest] += driver.tokens(output.request_id)
        driver.core.check_integrity()
        if victim in running and not in_flight:
            driver.core.abort(victim, driver.now)
        for request_id in [name for name in running if name not in driver.core._requests]:
            del running[request_id], prompts[request_id]
    return prompts


def count_ties(kept, fresh, prompts: dict[str, list[int]], sampling: SamplingParams) -> int:
    """Every request again without a cache; raises where a token differs that is no tie of the two best logits."""
    for request_id, prompt in prompts.items():
        fresh.add(request_id, prompt, None, sampling)
    fresh.run()
    num_ties = 0
    for request_id in prompts:
        for mine, other in zip(kept.outputs[request_id], fresh.outputs[request_id], strict=True):
            if mine.token_id != other.token_id:
                margin = other.logprobs.top[0][1] - other.logprobs.top[1][1]
                assert margin < TIE, f"{request_id}: {mine} != {other}"
                num_ties += 1
                break
    return num_ties


@pytest.mark.slow
@pytest.mark.parametrize(("family", "policy", "chunk_size"), COMBINATIONS)
def test_both_tiers_tiny_equal_stateless(family, policy, chunk_size, tiny_model, make_driver):
    rng = random.Random(f"{family} {policy}")
    options = {"chunk_size": chunk_size, "max_num_batched_tokens": 64, "max_num_seqs": 6, "max_model_len": WINDOW}
    kept = make_driver(
        tiny_model(family),
        num_gpu_blocks=320 // chunk_size,
        num_cpu_blocks=1200 // chunk_size,
        # Of ten blocks the least reserve is a tenth: hardly any request would be suspended.
        decode_reserve=0.02 if chunk_size < 32 else 0.0,
        eviction_policy=policy,
        write_through=policy == "lru",
        **options,
    )
    fresh = make_driver(tiny_model(family), num_gpu_blocks=2000 // chunk_size, mode="stateless", **options)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2)
    kept.loop.look_ahead = LookAhead.LAUNCH if chunk_size == 16 else LookAhead.DRAFT
    prompts = run_conversations(kept, rng, sampling)

    assert count_ties(kept, fresh, prompts, sampling) <= len(prompts) // 50
    stats = kept.core.get_statistics()
    assert stats["num_aborted"] > 0
    assert stats["num_suspensions"] > 0
    assert stats["num_used_drafts"] > 0
    assert stats["num_steps_ahead" if chunk_size == 16 else "num_discarded_drafts"] > 0
    assert stats["num_cpu_cached_tokens"] > 0
    assert stats["num_gpu_cached_tokens"] > 0
    assert stats["evictions"]["cpu_dropped"] > 0
    assert stats["evictions"]["gpu_reclaimed"] + stats["evictions"]["gpu_swapped_out"] > 0
    assert any(plan.swap_ins and plan.swap_outs for plan in kept.plans)


def kv_of(driver, request_id: str, num_tokens: int):
    """The KV of a running request's context: per layer, K and V as [num_tokens, heads * dim]."""
    request = driver.core._requests[request_id]
    blocks = [chunk.blocks[0] for chunk in request.chunks]
    return [
        tuple(pool[blocks].transpose(1, 2).flatten(0, 1).flatten(1)[:num_tokens] for pool in pools)
        for pools in driver.executor.gpu_store.layer_pools
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_restored_kv_and_logits_equal_recomputed_ones_per_layer(family, tiny_model, make_driver):
    """A context of which a part was swapped in, a part was dropped and recomputed, and a part never left."""
    options = {"chunk_size": 8, "max_model_len": 128}
    kept = make_driver(tiny_model(family), num_gpu_blocks=16, num_cpu_blocks=5, swap_out_watermark=0.0, **options)
    fresh = make_driver(tiny_model(family), num_gpu_blocks=16, mode="stateless", **options)
    rng = random.Random(family)
    prompt = rng.choices(range(3, 250), k=70)
    history = prompt + kept.generate("first", prompt, conversation_id="a")
    kept.generate("other", rng.choices(range(3, 250), k=100), conversation_id="b")

    context = [*history, 60, 61, 62]
    sampling = SamplingParams(temperature=0.0, max_tokens=4, logprobs=5)
    for driver in (kept, fresh):
        driver.add("again", context, "a", sampling)
        driver.step()
    start = kept.plans[-1]
    assert start.swap_ins, "nothing was in the CPU tier"
    assert len(start.segments) > 1, "nothing was dropped in the middle"
    assert kept.cached["again"] > 8 * len(start.swap_ins), "nothing had stayed on the GPU"
    for ours, theirs in zip(kv_of(kept, "again", len(context)), kv_of(fresh, "again", len(context)), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    ours, theirs = (dict(driver.outputs["again"][0].logprobs.top) for driver in (kept, fresh))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_no_request_waits_for_ever_when_both_tiers_are_full(tiny_model, make_driver):
    """Twelve contexts at once, three of which fill both tiers.

    There are preemptions, and yet each request ends within the steps that the work takes one by one.
    """
    driver = make_driver(
        tiny_model("llama"),
        chunk_size=8,
        num_gpu_blocks=16,
        num_cpu_blocks=24,
        max_model_len=128,
        max_num_seqs=12,
        max_num_batched_tokens=32,
        decode_reserve=0.0,
    )
    rng = random.Random(0)
    num_prompt, num_output = 30, 90
    for i in range(12):
        prompt = rng.choices(range(3, 250), k=num_prompt)
        driver.add(f"r{i}", prompt, f"c{i}", SamplingParams(temperature=0.0, max_tokens=num_output))
    # One after the other: a request's prompt takes at most two steps here, its answer one per token, and a preempted one
    # computes its context again in at most four.
    bound = 12 * (2 + num_output + 4)
    ended = []
    while driver.core.has_requests:
        ended += [output.request_id for output in driver.step() if output.finish_reason is not None]
        driver.core.check_integrity()
        assert driver.now <= bound
    stats = driver.core.get_statistics()
    assert stats["num_suspensions"] > 0
    assert stats["num_swap_ins"] > 0
    assert ended[0] == "r0", "the oldest request was held up by newer ones"
    assert sorted(ended) == sorted(f"r{i}" for i in range(12))


def test_a_failed_computation_loses_no_other_conversation_its_cache(tiny_model, make_driver, monkeypatch):
    """The step that fails has evicted others to the CPU tier: they are found there afterwards, and they are right."""
    options = {"chunk_size": 8, "max_model_len": 128}
    kept = make_driver(tiny_model("llama"), num_gpu_blocks=16, num_cpu_blocks=32, swap_out_watermark=0.0, **options)
    fresh = make_driver(tiny_model("llama"), num_gpu_blocks=16, mode="stateless", **options)
    rng = random.Random(0)
    prompt = rng.choices(range(3, 250), k=90)
    history = prompt + kept.generate("first", prompt, conversation_id="a")

    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("injected fault")

    kept.add("poison", rng.choices(range(3, 250), k=100), "b")
    plan = kept.core.schedule(kept.now)
    assert plan is not None
    assert plan.evictions
    with monkeypatch.context() as patch:
        patch.setattr(kept.executor.runner, "_forward", explode)
        with pytest.raises(ComputationFailedError, match="injected fault"):
            kept.executor.execute(plan)
    assert kept.core.fail_step(plan, kept.now, are_copies_made=True) == ["poison"]
    kept.core.check_integrity()

    sampling = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2)
    context = [*history, 60, 61]
    for driver in (kept, fresh):
        driver.generate("again", context, conversation_id="a", sampling=sampling)
    assert kept.cached["again"] == len(history) - 1
    assert kept.tokens("again") == fresh.tokens("again")
