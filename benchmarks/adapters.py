"""What adapters cost: seconds a step of SmolLM2 with none configured, with none in use, and with 1 to 4 in a batch.

    python benchmarks/adapters.py [--rounds 4]

All sides take turns in one run; ratios are of medians over all steps of a kind, to an engine without adapters. The adapters
have random weights and change all linear layers but the output's. Decoding: contexts of 64 to 96 tokens. Prompts: 128 tokens,
one a step. Writes benchmarks/results/adapters.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from machine import write_result
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.core.engine_core import RequestOutput
from engine.core.request import Request, SamplingParams
from engine.errors import EngineError
from engine.executor.local import LocalExecutor
from engine.make_core import make_core
from engine.model_files import model_location
from engine.step_loop import LookAhead, StepLoop

RANKS = (8, 32)
NUMS_OF_ADAPTERS = (0, 1, 2, 4)
BATCHES = (4, 8)
PROMPT_LEN, OUTPUT_LEN = 64, 32
LONG_PROMPT_LEN = 128


def save_adapter(model: Any, folder: Path, rank: int, seed: int) -> Path:
    """One of random weights, small enough that the answers stay those of a model at work."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            for letter, size in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                tensors[f"base_model.model.{name}.lora_{letter}.weight"] = 0.01 * torch.randn(size, generator=generator)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Side:
    """An engine whose steps are timed."""

    max_steps_in_flight = 1

    def __init__(self, **options: object) -> None:
        config = EngineConfig.from_options(
            {"model": "smollm2", "num_gpu_blocks": 256, "max_num_batched_tokens": 1024, **options}
        )
        self.executor = LocalExecutor(config)
        self.core = make_core(config, self.executor)
        self._loop = StepLoop(self.core, self.executor, self, time.perf_counter, LookAhead.NOTHING)  # type: ignore[arg-type]
        self._rng, self._num_requests = random.Random(0), 0

    def add(self, outputs: Iterable[RequestOutput]) -> None:
        """Nothing is done with the tokens."""

    def deliver(self) -> None:
        """There is no text to make."""

    def fail(self, request_ids: Iterable[str], error: EngineError) -> None:
        raise error

    def run(self, adapters: list[str], prompt_len: int, output_len: int) -> tuple[list[float], list[float]]:
        """A new prompt with each of the adapters, all at once: seconds of the steps with prompts, and of those without."""
        for adapter in adapters:
            self._num_requests += 1
            prompt = self._rng.choices(range(1000, 40000), k=prompt_len)
            sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
            request = Request(f"r{self._num_requests}", prompt, sampling, adapter=adapter)
            self.core.add_request(request, time.perf_counter())
        prompts: list[float] = []
        decodes: list[float] = []
        while self.core.has_requests:
            begin_s = time.perf_counter()
            plan = self._loop.step()
            took_s = time.perf_counter() - begin_s
            if plan is not None:
                (decodes if all(each.query_len == 1 for each in plan.segments) else prompts).append(took_s)
        return prompts, decodes


def measure(dtype: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each batch, rank and number of different adapters in it."""
    model = AutoModelForCausalLM.from_pretrained(model_location("smollm2"))
    folders = [
        [save_adapter(model, folder / f"{rank}-{i}", rank, i) for i in range(max(NUMS_OF_ADAPTERS))] for rank in RANKS
    ]
    del model
    configured = {
        f"{rank}-{i}": str(each) for rank, row in zip(RANKS, folders, strict=True) for i, each in enumerate(row)
    }
    without = Side(dtype=dtype)
    with_adapters = Side(dtype=dtype, adapters=configured, max_lora_rank=max(RANKS))
    identities = [[with_adapters.executor.load_adapter(str(each)) for each in row] for row in folders]
    cases: list[tuple[str, Side, list[str]]] = [
        ("none configured", without, [""]),
        ("none in use", with_adapters, [""]),
    ]
    for rank, row in zip(RANKS, identities, strict=True):
        cases += [(f"{num} of rank {rank}", with_adapters, row[:num]) for num in NUMS_OF_ADAPTERS if num]
    times: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
    for number in range(-1, rounds):
        for batch in BATCHES:
            for name, side, used in cases if number % 2 else reversed(cases):
                adapters = [used[i % len(used)] for i in range(batch)]
                _, decodes = side.run(adapters, PROMPT_LEN, OUTPUT_LEN)
                prompts, _ = side.run(adapters, LONG_PROMPT_LEN, 1)
                if number >= 0:  # the first round warms up
                    of_prompts, of_decodes = times.setdefault((batch, name), ([], []))
                    of_prompts += prompts
                    of_decodes += decodes
    rows = []
    for batch in BATCHES:
        base_prompt, base_decode = (statistics.median(each) for each in times[batch, "none configured"])
        for name, _, _ in cases:
            prompt, decode = (statistics.median(each) for each in times[batch, name])
            rows.append(
                {
                    "batch": batch,
                    "adapters": name,
                    "decode_ms": round(1e3 * decode, 2),
                    "decode_ratio": round(decode / base_decode, 3),
                    "prompt_ms": round(1e3 * prompt, 1),
                    "prompt_ratio": round(prompt / base_prompt, 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--name", default="adapters", help="of the result file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments.dtype, arguments.rounds, Path(folder))
    write_result(arguments.name, {"dtype": arguments.dtype, "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
