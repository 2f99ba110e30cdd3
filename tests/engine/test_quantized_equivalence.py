"""With quantised weights, too, greedy output does not depend on what is cached."""

from __future__ import annotations

import random

import pytest

from engine.core.request import SamplingParams
from tests.engine.executor.test_quantization import pytestmark  # noqa: F401

# An input that lies between two 8-bit values may be rounded to either after other batch shapes; where the two best logits are
# closer than this, either token may win.
TIE = 2e-2


@pytest.mark.parametrize(
    ("family", "quantization"),
    [("embedded", "int8"), ("embedded", "int4"), ("llama", "int8"), ("llama", "int4"), ("gpt2", "int4")],
)
def test_quantised_conversations_equal_stateless(family, quantization, tiny_model, make_driver):
    """Six conversations of three turns at once, over a GPU tier for two of them and a CPU tier for two more."""
    model = "embedded" if family == "embedded" else tiny_model(family)
    options = {
        "chunk_size": 8,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 4,
        "max_model_len": 160,
        "quantization": quantization,
    }
    kept = make_driver(model, num_gpu_blocks=32, num_cpu_blocks=30, **options)
    fresh = make_driver(model, num_gpu_blocks=200, mode="stateless", **options)
    rng = random.Random(family)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2, ignore_eos=True)
    histories = {f"c{i}": rng.choices(range(3, 250), k=11) for i in range(6)}
    num_ties = 0
    for turn in range(3):
        for conversation, history in histories.items():
            history += rng.choices(range(3, 250), k=rng.randint(2, 30))
            for driver in (kept, fresh):
                driver.add(f"{conversation}.{turn}", history, conversation, sampling)
        for driver in (kept, fresh):
            driver.run()
            driver.core.check_integrity()
        for conversation, history in histories.items():
            request_id = f"{conversation}.{turn}"
            history += fresh.tokens(request_id)
            if kept.tokens(request_id) != fresh.tokens(request_id):
                num_ties += 1
                pairs = zip(kept.outputs[request_id], fresh.outputs[request_id], strict=True)
                first = next(other for mine, other in pairs if mine.token_id != other.token_id)
                assert first.logprobs.top[0][1] - first.logprobs.top[1][1] < TIE
    assert num_ties <= 1
