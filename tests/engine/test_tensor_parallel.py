"""The thesis for a sharded model: ranks that follow the same plans give the answers of one process.

That holds whatever was evicted, swapped or recomputed on all of them.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch

from engine import cli
from engine.core.request import SamplingParams
from tests.engine.test_equivalence import assert_same_tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs each rank takes one")

NUM_CONVERSATIONS = 10
NUM_TURNS = 3
OPTIONS = {"chunk_size": 8, "max_num_batched_tokens": 64, "max_num_seqs": 6, "max_model_len": 160}
SAMPLING = SamplingParams(temperature=0.0, max_tokens=7, logprobs=2)
# Two ranks for every kind of plan: transformers' own, with experts, with a window and a scaled embedding; and those that are
# here. Four: more ranks than KV heads.
GROUPS = [("llama", 2), ("qwen3", 2), ("mixtral", 2), ("opt", 2), ("gpt2", 2)]
if os.environ.get("HYPOTHESIS_PROFILE") == "nightly":
    GROUPS += [("gemma2", 2), ("mistral", 2), ("llama", 4), ("qwen3", 4), ("mixtral", 4), ("opt", 4), ("gpt2", 4)]


def sampling_of(request_id: str) -> SamplingParams:
    """Some ask for the log-probabilities of their prompts."""
    return replace(SAMPLING, prompt_logprobs=1) if request_id.startswith("c0") else SAMPLING


def converse(driver, rng: random.Random) -> dict[str, list[int]]:
    """Conversations side by side, over more turns than the tiers hold; returns the prompts."""
    vocabulary = range(3, 250)
    histories = {f"c{number}": rng.choices(vocabulary, k=12) for number in range(NUM_CONVERSATIONS)}
    prompts = {}
    for turn in range(NUM_TURNS):
        for conversation in rng.sample(list(histories), NUM_CONVERSATIONS):
            request_id = f"{conversation}.{turn}"
            prompts[request_id] = histories[conversation] + rng.choices(vocabulary, k=rng.randint(5, 20))
            driver.add(request_id, prompts[request_id], conversation, sampling_of(request_id))
            driver.step()
        driver.run()
        driver.core.check_integrity()
        for conversation in histories:
            request_id = f"{conversation}.{turn}"
            histories[conversation] = prompts[request_id] + driver.tokens(request_id)
    return prompts


@pytest.mark.parametrize(("family", "size"), GROUPS)
def test_ranks_give_the_answers_of_one_process(family, size, tiny_model, make_driver):
    tiers = {"num_gpu_blocks": 24, "num_cpu_blocks": 30, "verify_swaps": True}
    sharded = make_driver(tiny_model(family), tensor_parallel_size=size, decode_reserve=0.02, **tiers, **OPTIONS)
    whole = make_driver(tiny_model(family), num_gpu_blocks=200, mode="stateless", **OPTIONS)
    prompts = converse(sharded, random.Random(family))
    num_ties = 0
    for request_id, prompt in prompts.items():
        whole.add(request_id, prompt, None, sampling_of(request_id))
        whole.run()
        num_ties += assert_same_tokens(sharded, whole, request_id)
        ours, theirs = (driver.outputs[request_id][0].prompt_logprobs for driver in (sharded, whole))
        assert len(ours) == (len(prompt) - 1 if request_id.startswith("c0") else 0)
        assert [each.chosen for each in ours] == pytest.approx([each.chosen for each in theirs], abs=1e-3)

    assert num_ties <= 1
    stats = sharded.core.get_statistics()
    assert stats["num_suspensions"] > 0
    assert stats["num_swap_ins"] > 0
    assert stats["num_gpu_cached_tokens"] > 0
    assert stats["num_dropped_tokens"] > 0
    assert stats["evictions"]["cpu_dropped"] > 0
    assert stats["num_failed"] == 0


def test_the_command_line_generates_with_ranks_of_its_own(capsys):
    arguments = ["generate", "my cat is called", "--model", "embedded", "--dtype", "float32"]
    arguments += ["--max-tokens", "12", "--num-gpu-blocks", "32"]
    assert cli.main(arguments) == 0
    whole = capsys.readouterr().out
    assert cli.main([*arguments, "--tensor-parallel-size", "2"]) == 0
    assert capsys.readouterr().out == whole
