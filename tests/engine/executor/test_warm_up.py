"""Steps before the first request: whatever kernels serving may launch, one of these has launched before."""

from __future__ import annotations

import inspect
import random
from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.executor.model_loader import load_model
from engine.executor.model_runner import ModelRunner
from engine.executor.step_inputs import StepLimits
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.swapper import ThreadSwapper
from engine.executor.warm_up import end_of, kinds_of_steps, step_of, warm_up
from tests.conftest import save_tiny_model

triton_paged = pytest.importorskip(
    "engine.attention.triton_paged", reason="triton, which is optional, is not installed"
)

WINDOW = 2200
# Arguments that Triton is told not to compile for.
NOT_SPECIALIZED = {"num_tokens", "table_stride"}


class Launches:
    """In place of a kernel: notes for what Triton would compile it anew, and computes zeros."""

    def __init__(self, kernel, seen: set[tuple]) -> None:
        self._names = list(inspect.signature(kernel.fn).parameters)
        self._name = kernel.fn.__name__
        self._seen = seen

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **options) -> None:
        kinds = [self._kind(name, value) for name, value in zip(self._names, args, strict=False)]
        self._seen.add((self._name, *kinds, *sorted(options.items())))
        if self._names[0] == "out":
            args[0].zero_()

    @staticmethod
    def _kind(name: str, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, int) and name not in NOT_SPECIALIZED:
            return value == 1, value % 16 == 0
        return type(value)


@pytest.fixture
def launches(monkeypatch) -> set[tuple]:
    seen: set[tuple] = set()
    for name in ("_attend_kernel", "_combine_kernel", "_write_kernel"):
        monkeypatch.setattr(triton_paged, name, Launches(getattr(triton_paged, name), seen))
    return seen


def make_runner(folder, **options) -> tuple[EngineConfig, KVStore, ModelRunner]:
    config = EngineConfig(
        model=str(folder),
        dtype="bfloat16",
        num_threads=1,
        chunk_size=16,
        max_num_batched_tokens=1024,
        pack_weights=False,
    )
    config = replace(config, **options)
    loaded = load_model(config)
    device = torch.device("cpu")
    stores = [KVStore(loaded.layers, num_blocks=n, chunk_size=16, dtype=loaded.dtype, device=device) for n in (150, 0)]
    limits = StepLimits(config.max_num_seqs, config.max_num_batched_tokens, 150)
    swapper = ThreadSwapper(*stores, verify=False)
    return config, stores[0], ModelRunner(loaded, stores[0], swapper, triton_paged, limits)


def random_segments(rng: random.Random) -> list[tuple[int, int]]:
    """As serving may have them: decodes, new tokens behind a context, first prompts, in any mixture."""

    def segment() -> tuple[int, int]:
        kind = rng.choice(kinds)
        context_len = rng.choice([rng.randint(1, 40), rng.randint(1, 700), rng.randint(1000, WINDOW)])
        if kind == "decode":
            return 1, context_len
        query_len = min(context_len, rng.choice([2, 5, 31, 64, 130, 300, 700]))
        return query_len, query_len if kind == "first" else context_len

    kinds = rng.choice(
        [["decode"], ["decode", "new"], ["new"], ["first"], ["new", "first"], ["decode", "new", "first"]]
    )
    segments: list[tuple[int, int]] = []
    for _ in range(rng.randint(1, 8)):
        segments.append(segment())
        if sum(query_len for query_len, _ in segments) > 1024:
            segments.pop()
    return segments or [(1, 5)]


FAMILIES = {
    "llama": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 300},
    "opt": {"max_position_embeddings": WINDOW},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_serving_launches_no_kernel_that_is_not_compiled_at_the_start(family, tmp_path, launches):
    overrides = {"max_position_embeddings": WINDOW} | FAMILIES[family]
    config, store, runner = make_runner(save_tiny_model(family, tmp_path / family, **overrides))
    warm_up(config, runner._loaded, store, runner)
    warm = set(launches)
    assert {launch[0] for launch in warm} == {"_attend_kernel", "_combine_kernel", "_write_kernel"}
    rng = random.Random(0)
    for _ in range(60):
        step = step_of(random_segments(rng), SamplingParams(temperature=0.0), config.chunk_size)
        runner.execute(step)
        runner.execute(end_of(step))
        assert launches <= warm, [segment.query_len for segment in step.segments]


@pytest.mark.parametrize(
    ("options", "longest", "kinds"),
    [
        (
            {},
            4096,
            {
                "decodes": [(1, 4096)],
                "prompts": [(128, 4096)],
                "a prompt among decodes": [(1, 4096), (2, 4096)],
            },
        ),
        (
            {"max_num_seqs": 1, "max_num_batched_tokens": 64},
            100,
            {"decodes": [(1, 100)], "prompts": [(63, 100)]},
        ),
        ({}, 2, {"decodes": [(1, 2)]}),
        ({}, 1, {"decodes": [(1, 1)]}),
    ],
)
def test_first_steps_are_within_the_limits_of_all_steps(options, longest, kinds):
    assert kinds_of_steps(EngineConfig(**options), longest) == kinds
