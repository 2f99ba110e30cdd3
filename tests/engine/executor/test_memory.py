"""How much of a GPU is left for blocks, and what is said where memory runs out at the start."""

from __future__ import annotations

import pytest
import torch

from engine.attention.backend import choose_backend
from engine.config import EngineConfig
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


def test_what_is_left_is_the_share_without_the_step_the_graphs_and_the_others(config, monkeypatch):
    """The largest step really runs, and another one behind it; what the device says of its memory is made up."""
    loaded = load_model(config)
    calls = []
    for name in ("launch", "complete"):
        inner = getattr(ModelRunner, name)
        monkeypatch.setattr(ModelRunner, name, lambda *args, n=name, f=inner: (calls.append(n), f(*args))[1])
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 20 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 17 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(memory, "_measure_graphs", lambda runner, device, sizes: GIB)
    backend = choose_backend("cpu", loaded.device, loaded.dtype)
    # 72 are ours; 3 belong to somebody else.
    assert bytes_left_for_blocks(config, loaded, backend) == pytest.approx((72 - 20 - 1 - 3) * GIB)
    in_flight = ["launch", "launch", "complete", "complete"]
    assert calls == [*in_flight, "launch", "complete"] * 2  # whose requests end then


def test_graphs_are_the_largest_and_as_many_more_as_there_are_sizes(monkeypatch):
    free = iter([100, 70, 70, 65])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 0))
    monkeypatch.setattr(memory, "CudaGraphMaker", lambda device: None)
    captured = []

    class Runner:
        def capture_graphs(self, maker, sizes):
            captured.append(sizes)

    assert memory._measure_graphs(Runner(), torch.device("cuda"), (1, 2, 4, 8)) == 30 + 3 * 5
    assert captured == [[8], [4]]


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


# -- host memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"gpu_memory_gib": 100_000.0}, "gpu_memory_gib"),
        ({"num_gpu_blocks": 1 << 40}, "num_gpu_blocks"),
        ({"num_gpu_blocks": 4, "kv_offloading_size": 100_000.0}, "kv_offloading_size"),
        ({"num_gpu_blocks": 4, "num_cpu_blocks": 1 << 60}, "num_cpu_blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tiers_that_host_memory_cannot_hold_name_the_option_and_what_there_is(options, option):
    total = memory.host_memory()
    assert total is not None
    with pytest.raises(ConfigError, match=f"lower {option}") as error:
        LocalExecutor(EngineConfig(num_threads=1, **options))
    assert error.value.param == option
    assert f"but this process can have {total.total / GIB:.1f} GiB" in error.value.message


def test_memory_that_is_there_but_taken_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(memory, "host_memory", lambda: memory.HostMemory(total=8 * GIB, available=GIB))
    config = EngineConfig(gpu_memory_gib=2.0)
    memory.check_host_memory(config, GIB // 2, GIB // 2)
    assert not caplog.records
    memory.check_host_memory(config, 2 * GIB, GIB)
    assert "2.0 GiB for gpu_memory_gib, 1.0 GiB for kv_offloading_size" in caplog.text
    with pytest.raises(ConfigError, match="lower gpu_memory_gib"):
        memory.check_host_memory(config, 7 * GIB, 2 * GIB)


@pytest.mark.parametrize(("limit", "total"), [("max", 4096), ("1048576", 1024), ("9223372036854771712", 4096)])
def test_a_control_groups_limit_counts(limit, total, tmp_path, monkeypatch):
    meminfo, path = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       4096 kB\nMemFree:        1 kB\nMemAvailable:   2048 kB\n")
    path.write_text(f"{limit}\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "MEMORY_LIMITS", (tmp_path / "none", path))
    assert memory.host_memory() == memory.HostMemory(total * 1024, min(total, 2048) * 1024)
    meminfo.unlink()
    assert memory.host_memory() is None
