"""Requests that give way to another tenant's go on later with the answers of an undisturbed run.

With one tier and two, planned step by step and ahead, in one process and in a group of ranks.
"""

from __future__ import annotations

import pytest

from engine.core.request import SamplingParams
from engine.step_loop import LookAhead
from tests.engine.test_equivalence import assert_same_tokens

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
PENALISED = SamplingParams(
    temperature=1.1, seed=7, max_tokens=20, frequency_penalty=0.4, repetition_penalty=1.3, ignore_eos=True, logprobs=2
)
SHORT = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2)


@pytest.mark.parametrize(
    ("family", "num_cpu_blocks", "look_ahead", "num_ranks"),
    [
        ("llama", 0, LookAhead.DRAFT, 1),
        ("llama", 12, LookAhead.DRAFT, 1),
        ("mistral", 12, LookAhead.LAUNCH, 1),
        ("gemma2", 0, LookAhead.LAUNCH, 1),
        ("llama", 12, LookAhead.DRAFT, 2),
    ],
)
def test_answers_are_the_same_with_and_without_giving_way(
    family, num_cpu_blocks, look_ahead, num_ranks, tiny_model, make_driver
) -> None:
    """ "a" has all four places and nearly all blocks when the turns of "b" come one after the other."""
    sizes = {"chunk_size": 8, "max_num_batched_tokens": 24, "max_model_len": 80, "max_num_seqs": 4}
    tiers = {"num_gpu_blocks": 26, "num_cpu_blocks": num_cpu_blocks, "decode_reserve": 0.05}
    shared = make_driver(tiny_model(family), tensor_parallel_size=num_ranks, **tiers, **sizes)
    shared.loop.look_ahead = look_ahead
    alone = make_driver(tiny_model(family), num_gpu_blocks=40, mode="stateless", **sizes)
    prompts = {f"a{i}": [(7 * i + 3 * k) % 250 + 2 for k in range(30 + i)] for i in range(5)}
    samplings = {name: PENALISED if name in ("a2", "a3") else GREEDY for name in prompts}
    for name, prompt in prompts.items():
        shared.add(name, prompt, sampling=samplings[name], tenant="a")
    for _ in range(10):
        shared.step()
    for i in range(3):
        name = f"b{i}"
        prompts[name], samplings[name] = [(11 * i + 5 * k) % 250 + 2 for k in range(18)], SHORT
        shared.add(name, prompts[name], sampling=SHORT, tenant="b")
        while name not in shared.finished:
            shared.step()
            shared.core.check_integrity()
    assert not all(f"a{i}" in shared.finished for i in range(5)), "a had all places until b came"
    shared.run()
    shared.core.check_integrity()
    statistics = shared.core.get_statistics()
    assert statistics["num_gave_way"] >= 2
    assert statistics["num_finished"] == len(prompts)
    assert bool(statistics["num_swap_ins"]) == bool(num_cpu_blocks)

    num_ties = 0
    for name, prompt in prompts.items():
        alone.add(name, prompt, sampling=samplings[name])
        alone.run()
        num_ties += assert_same_tokens(shared, alone, name)
    assert num_ties <= 1
