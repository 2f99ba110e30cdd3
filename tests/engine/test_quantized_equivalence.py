"""With quantised weights, too, greedy output does not depend on what is cached."""

from __future__ import annotations

import random

import pytest

from engine.core.request import SamplingParams
from tests.conftest import save_tiny_model
from tests.engine.executor.test_quantization import pytestmark  # noqa: F401
from tests.lora import save_adapter

# An input that lies between two 8-bit values may be rounded to either after other batch shapes; where the two best logits are
# closer than this, either token may win.
TIE = 2e-2
# A rank looks for values far beyond the others among its own part of a row.
RANKS_TIE = 5e-2


@pytest.mark.parametrize(
    ("family", "quantization", "num_ranks", "num_adapters"),
    [
        ("embedded", "int8", 1, 0),
        ("embedded", "int4", 1, 0),
        ("llama", "int8", 1, 0),
        ("llama", "int4", 1, 0),
        ("gpt2", "int4", 1, 0),
        ("llama", "int8", 2, 0),
        ("qwen3", "int8", 1, 2),
        ("qwen3", "int4", 1, 2),
    ],
)
def test_quantised_conversations_equal_stateless(
    family, quantization, num_ranks, num_adapters, tiny_model, tmp_path, make_driver
):
    """Six conversations of three turns at once, over a GPU tier for two of them and a CPU tier for two more.

    With adapters, a third of the conversations has each of them, and a third none. Ranks are compared with one process; their
    parts of a layer consist of whole blocks of 32 inputs, so that they are rounded alike.
    """
    model = "embedded" if family == "embedded" else tiny_model(family)
    if num_ranks > 1:
        model = save_tiny_model(family, tmp_path / "model", intermediate_size=128)
    folders = [str(save_adapter(model, tmp_path / f"a{i}", i, "all-linear")) for i in range(num_adapters)]
    options = {
        "chunk_size": 8,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 4,
        "max_model_len": 160,
        "quantization": quantization,
        "adapters": {f"a{i}": folder for i, folder in enumerate(folders)},
    }
    kept = make_driver(model, num_gpu_blocks=32, num_cpu_blocks=30, tensor_parallel_size=num_ranks, **options)
    fresh = make_driver(model, num_gpu_blocks=200, mode="stateless", **options)
    adapters = ["", *map(kept.executor.load_adapter, folders)]
    assert adapters[1:] == [fresh.executor.load_adapter(folder) for folder in folders]
    rng = random.Random(family)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2, ignore_eos=True)
    histories = {f"c{i}": rng.choices(range(3, 250), k=11) for i in range(6)}
    num_ties = 0
    for turn in range(3):
        for number, (conversation, history) in enumerate(histories.items()):
            history += rng.choices(range(3, 250), k=rng.randint(2, 30))
            adapter = adapters[number % len(adapters)]
            for driver in (kept, fresh):
                driver.add(f"{conversation}.{turn}", history, conversation, sampling, adapter=adapter)
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
                assert first.logprobs.top[0][1] - first.logprobs.top[1][1] < (TIE if num_ranks == 1 else RANKS_TIE)
    assert num_ties <= 1
    prompt, answers = list(range(20, 40)), []
    for number, adapter in enumerate(adapters):
        answers.append(tuple(fresh.generate(f"alone {number}", prompt, sampling=sampling, adapter=adapter)))
    assert len(set(answers)) == len(adapters), "an adapter changes nothing"
