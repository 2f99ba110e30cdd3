"""How much of a GPU is left for blocks, and what is said where memory runs out at the start."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.attention import cpu
from engine.attention.choice import choose_backend
from engine.config import EngineConfig
from engine.core.executor_protocol import ModelFacts
from engine.errors import ConfigError
from engine.executor import local, memory
from engine.executor.local import LocalExecutor
from engine.executor.memory import (
    COSTLY_SAMPLING,
    bytes_left_for_blocks,
    largest_step,
    make_toy_runner,
    out_of_memory_means,
)
from engine.executor.model_loader import load_model
from engine.executor.model_runner import ModelRunner

GIB = 1 << 30


@pytest.fixture
def config() -> EngineConfig:
    return EngineConfig(max_num_seqs=5, max_num_batched_tokens=70, max_model_len=100, dtype="float32", num_threads=1)


def test_the_largest_step_fills_the_budget_and_samples_for_everybody_at_full_cost(config, monkeypatch):
    loaded = load_model(config)
    plan = largest_step(config, loaded, COSTLY_SAMPLING[0])
    assert plan.num_tokens == 70
    assert sum(segment.samples for segment in plan.segments) == 5
    assert max(segment.context_len for segment in plan.segments) == 100
    from engine.executor import sampler

    sizes = []
    inner = sampler._sorted_candidates
    monkeypatch.setattr(sampler, "_sorted_candidates", lambda scaled, n: (sizes.append(n), inner(scaled, n))[1])
    runner = make_toy_runner(config, loaded, choose_backend("cpu", loaded.device, loaded.dtype))
    result = runner.execute(plan)
    assert len(result.token_ids) == len(result.logprobs) == 5
    assert max(sizes) == loaded.vocab_size


def model_with_window(max_model_len: int) -> SimpleNamespace:
    """A loaded model of which nothing but its facts is there."""
    counts = dict.fromkeys(("vocab_size", "num_parameters", "num_layers", "num_attention_heads", "head_dim"), 1)
    facts = ModelFacts(fingerprint="", dtype="float32", max_model_len=max_model_len, eos_token_ids=(), **counts)
    return SimpleNamespace(facts=facts)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(1, 100)] * 4 + [(66, 100)]),
        # A prompt of the whole window does not fill the budget.
        ({"max_num_batched_tokens": 260}, [(1, 100), (1, 100), (58, 100), (100, 100), (100, 100)]),
        ({"max_num_seqs": 1, "max_num_batched_tokens": 512}, [(100, 100)]),
        ({"max_model_len": 1, "max_num_batched_tokens": 64}, [(1, 1)] * 5),
    ],
)
def test_the_largest_step_has_prompts_that_fill_the_budget(config, options, expected):
    config = replace(config, **options)
    loaded = model_with_window(512)
    step = largest_step(config, loaded, COSTLY_SAMPLING[0])
    assert [(segment.query_len, segment.context_len) for segment in step.segments] == expected


def test_a_budget_beyond_the_contexts_that_are_looked_at_is_filled(config):
    config = replace(config, max_num_batched_tokens=40_000, max_model_len=100_000)
    assert largest_step(config, model_with_window(131_072), COSTLY_SAMPLING[1]).num_tokens == 40_000


class Replaying:
    """A backend whose decodes may be recorded: the C++ kernel."""

    CAN_REPLAY_DECODES = True
    CAN_REPLAY_PROMPTS = False
    write_kv = staticmethod(cpu.write_kv)
    attend = staticmethod(cpu.attend)


def test_what_is_left_is_the_share_without_the_steps_the_graphs_and_the_others(config, monkeypatch, cuda_calls):
    """The largest steps really run, each with another one behind it, and graphs are recorded.

    What the device says of its memory is made up.
    """
    config = replace(config, max_num_batched_tokens=600, max_model_len=None)
    loaded = load_model(config)
    calls = []
    for name in ("launch", "complete", "capture_graphs"):
        inner = getattr(ModelRunner, name)
        monkeypatch.setattr(ModelRunner, name, lambda *args, n=name, f=inner: (calls.append(n), f(*args))[1])
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 20 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 17 * GIB)
    # After the steps; before and after the recording of the largest size and of the next.
    free = iter([60 * GIB, 60 * GIB, 59 * GIB, 59 * GIB, 58.5 * GIB])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 80 * GIB))
    left = bytes_left_for_blocks(config, loaded, Replaying())
    # 72 are ours; 3 belong to another process; 4 sizes of graphs.
    assert left == pytest.approx((72 - 20 - (1 + 3 * 0.5) - 3) * GIB)
    in_flight = ["launch", "launch", "complete", "complete"]
    steps = [*in_flight, "launch", "complete"] * 2  # whose requests end then
    assert calls == [*steps, "capture_graphs", "capture_graphs"]


def test_graphs_are_the_largest_of_each_kind_and_as_many_more_as_there_are_sizes(config, monkeypatch):
    free = iter([1000, 900, 900, 880, 100, 70, 70, 65])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 0))
    monkeypatch.setattr(memory, "CudaGraphMaker", lambda device: None)
    captured = []

    class Runner:
        def capture_graphs(self, maker, sizes, prompt_sizes):
            captured.append((sizes, prompt_sizes))

    backend = Replaying()
    backend.CAN_REPLAY_PROMPTS = True
    config = replace(config, max_num_seqs=8, max_num_batched_tokens=130)  # prompts of up to 32, 64, 128 and 130 rows
    assert memory._measure_graphs(Runner(), torch.device("cuda"), config, backend) == 100 + 3 * 20 + 30 + 3 * 5
    assert captured == [((), (130,)), ((), (128,)), ((8,), ()), ((4,), ())]


def test_memory_that_runs_out_says_what_to_lower():
    failure = RuntimeError("a step failed")
    failure.__cause__ = torch.OutOfMemoryError("CUDA out of memory.\nlong text")
    with (
        pytest.raises(ConfigError, match=r"lower it \(CUDA out of memory") as caught,
        out_of_memory_means("lower it", "x"),
    ):
        raise failure
    assert caught.value.param == "x"
    assert "long text" not in caught.value.message
    with pytest.raises(KeyError), out_of_memory_means("lower it", "x"):
        raise KeyError("another fault is left alone")


@pytest.mark.parametrize(
    ("place", "match"), [("load_model", "smaller model"), ("KVStore", "lower gpu_memory_utilization")]
)
def test_an_executor_without_room_says_what_to_lower(place, match, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(local, place, fail)
    with pytest.raises(ConfigError, match=match):
        LocalExecutor(EngineConfig(num_gpu_blocks=4, num_cpu_blocks=0, num_threads=1))
