"""The thesis: greedy output never depends on what was evicted, recomputed, shared, forked, suspended or aborted."""

from __future__ import annotations

import random

import pytest

from engine.core.request import SamplingParams
from engine.embedded_model import embedded_model_path
from engine.step_loop import LookAhead

NUM_CONVERSATIONS = 20
NUM_TURNS = 4
# Batch shapes change float rounding: where the two best logits are closer than this, either may win.
TIE = 1e-4


def assert_same_tokens(kept, fresh, request_id: str) -> int:
    """Token for token the same, up to a tie, after which nothing is comparable. Returns the number of ties (0 or 1)."""
    ours, theirs = kept.outputs[request_id], fresh.outputs[request_id]
    for mine, other in zip(ours, theirs, strict=False):
        if mine.token_id != other.token_id:
            margin = other.logprobs.top[0][1] - other.logprobs.top[1][1]
            assert margin < TIE, f"{request_id}: {mine} != {other}"
            return 1
    assert len(ours) == len(theirs)
    return 0


@pytest.mark.parametrize(
    ("family", "look_ahead"),
    [
        *(
            (family, LookAhead.DRAFT)
            for family in ("embedded", "llama", "qwen3", "mistral", "gemma2", "gpt2", "opt", "mixtral")
        ),
        *((family, LookAhead.LAUNCH) for family in ("llama", "gemma2", "mistral")),
    ],
)
def test_interleaved_conversations_equal_stateless(family, look_ahead, tiny_model, make_driver):
    """20 conversations over a GPU tier for about a fifth of them: evictions, holes, suspensions, forks and aborts."""
    rng = random.Random(family)
    model = embedded_model_path() if family == "embedded" else tiny_model(family)
    options = {"chunk_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 5, "max_model_len": 200}
    kept = make_driver(model, num_gpu_blocks=32, num_cpu_blocks=0, decode_reserve=0.03, **options)
    fresh = make_driver(model, num_gpu_blocks=200, mode="stateless", **options)
    kept.loop.look_ahead = look_ahead
    vocabulary = range(3, 250)
    system_prompt = rng.choices(vocabulary, k=19)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2, ignore_eos=True)
    histories = {f"c{i}": system_prompt[:] for i in range(NUM_CONVERSATIONS)}
    turns_left = dict.fromkeys(histories, NUM_TURNS)
    running: dict[str, str] = {}  # request id -> conversation id
    prompts: dict[str, list[int]] = {}
    num_requests = num_aborted = 0
    latest = "c0"
    while any(turns_left.values()) or running or kept.loop.in_flight:
        idle = [c for c in histories if turns_left[c] and c not in running.values()]
        if idle and rng.random() < 0.5:
            conversation = rng.choice(idle)
            num_requests += 1
            request_id = f"r{num_requests}"
            if rng.random() < 0.2:  # a fork: this conversation goes on from another one's history, often a fresh one
                histories[conversation] = histories[rng.choice([latest, rng.choice(list(histories))])][:120]
            histories[conversation] = histories[conversation] + rng.choices(vocabulary, k=rng.randint(1, 24))
            prompts[request_id] = histories[conversation][:]
            kept.add(request_id, prompts[request_id], conversation, sampling)
            turns_left[conversation] -= 1
            running[request_id] = conversation
        for output in kept.step():
            if output.finish_reason is not None:
                latest = running.pop(output.request_id)
                histories[latest] += kept.tokens(output.request_id)
        kept.core.check_integrity()
        if running and rng.random() < 0.02:
            victim = rng.choice(list(running))
            kept.core.abort(victim, kept.now)
            num_aborted += 1
        for request_id in [name for name in running if name not in kept.core._requests]:
            del running[request_id], prompts[request_id]
    num_ties = 0
    for request_id, prompt in prompts.items():
        fresh.add(request_id, prompt, None, sampling)
        fresh.run()
        num_ties += assert_same_tokens(kept, fresh, request_id)

    assert num_ties <= 2
    stats = kept.core.get_statistics()
    assert num_aborted
    assert sum(stats["evictions"].values()) > 50
    assert stats["num_gpu_cached_tokens"] > 0
    assert stats["num_suspensions"] > 0
    assert stats["num_used_drafts"] > 0
    assert stats["num_steps_ahead" if look_ahead is LookAhead.LAUNCH else "num_discarded_drafts"] > 0
    segments_of_a_request = [
        sum(s.request_id == start.request_id for s in plan.segments) for plan in kept.plans for start in plan.starts
    ]
    assert max(segments_of_a_request) > 1, "no hole was ever recomputed with what follows it"
    assert fresh.core.get_statistics()["num_gpu_cached_tokens"] == 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_forks_and_repeats_copy_the_tail_and_stay_exact(family, tiny_model, make_driver):
    """Another conversation that continues a tail gets a copy of it; the same prompt again computes its last token only."""
    options = {"num_gpu_blocks": 64, "chunk_size": 8, "max_model_len": 200}
    kept = make_driver(tiny_model(family), **options)
    fresh = make_driver(tiny_model(family), mode="stateless", **options)
    prompt = list(range(10, 40))
    answer = kept.generate("first", prompt, conversation_id="a")
    history = prompt + answer
    for request_id, conversation, extra, num_computed in [
        ("fork-1", "b", [50, 51], 3),  # the answer's last token has never been through the model
        ("fork-2", "c", [60], 2),
        ("own", "a", [70, 71, 72], 4),
        ("again", "d", [70, 71, 72], 1),
    ]:
        kept.generate(request_id, history + extra, conversation_id=conversation)
        fresh.generate(request_id, history + extra)
        assert assert_same_tokens(kept, fresh, request_id) == 0
        assert len(history + extra) - kept.cached[request_id] == num_computed
        kept.core.check_integrity()
    assert kept.core.get_statistics()["num_gpu_copies"] == 2
