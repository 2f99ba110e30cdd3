"""Greedy fp32 output is the same by every path of the CPU executor.

Torch's attention or the C++ kernel, plain or packed weights, the next step drafted or not.
"""

from __future__ import annotations

import random

import pytest

from engine.core.request import SamplingParams
from engine.step_loop import LookAhead
from tests.engine.test_equivalence import assert_same_tokens

FAMILIES = ["embedded", "llama", "qwen3", "mistral", "gemma2", "gpt2", "opt", "mixtral"]
PATHS = [
    {"attention_backend": "reference", "pack_weights": False},
    {"attention_backend": "cpu", "pack_weights": False},
    {"attention_backend": "reference", "pack_weights": True},
    {"attention_backend": "cpu", "pack_weights": True},
]


def run_conversations(driver, answers) -> None:
    """Six conversations of three turns at once; the GPU tier holds two of them, the CPU tier the rest.

    They go on from the answers of the driver `answers`.
    """
    rng = random.Random(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2, ignore_eos=True)
    histories = {f"c{i}": rng.choices(range(3, 250), k=11) for i in range(6)}
    for turn in range(3):
        for conversation, history in histories.items():
            history += rng.choices(range(3, 250), k=rng.randint(2, 30))
            driver.add(f"{conversation}.{turn}", history, conversation, sampling)
        driver.run()
        for conversation, history in histories.items():
            history += answers.tokens(f"{conversation}.{turn}")
        driver.core.check_integrity()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_gives_the_same_tokens(family, tiny_model, make_driver):
    model = "embedded" if family == "embedded" else tiny_model(family)
    options = {"chunk_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 4, "max_model_len": 160}
    drivers = []
    for path in PATHS:
        for look_ahead in (LookAhead.NOTHING, LookAhead.DRAFT):
            driver = make_driver(model, num_gpu_blocks=32, num_cpu_blocks=60, **options, **path)
            driver.loop.look_ahead = look_ahead
            drivers.append(driver)
            run_conversations(driver, drivers[0])
    first, *others = drivers
    num_ties = 0
    for driver in others:
        num_ties += sum(assert_same_tokens(driver, first, request_id) for request_id in first.outputs)
    assert num_ties <= 2
    for off, on in zip(drivers[::2], drivers[1::2], strict=True):
        assert on.core.get_statistics()["num_used_drafts"] > 0
        assert off.core.get_statistics()["num_used_drafts"] == 0
    stats = first.core.get_statistics()
    assert stats["num_swap_ins"] > 0
