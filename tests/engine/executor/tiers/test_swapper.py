"""Swaps move the right bytes, in the order that the plan promises; a wrong one is seen."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from engine.attention.protocol import LayerShape
from engine.core.plan import StepPlan
from engine.core.request import SamplingParams
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.swapper import LayerGates, ThreadSwapper
from engine.server import create_server
from tests.copies import local_copy, swap_in, swap_out

LAYERS = (LayerShape(2, 8, 8), LayerShape(2, 8, 4), LayerShape(1, 16, 16))


@pytest.fixture
def stores():
    sizes = {"chunk_size": 4, "dtype": torch.float32, "device": torch.device("cpu")}
    gpu, cpu = KVStore(LAYERS, num_blocks=6, **sizes), KVStore(LAYERS, num_blocks=5, **sizes)
    gpu.storage.copy_(torch.arange(6.0)[:, None].expand_as(gpu.storage))
    cpu.storage.copy_(100 + torch.arange(5.0)[:, None].expand_as(cpu.storage))
    return gpu, cpu


def contents(store: KVStore) -> list[float]:
    """The value that fills each block; raises where a block is mixed."""
    assert (store.storage == store.storage[:, :1]).all()
    return store.storage[:, 0].tolist()


@pytest.mark.parametrize("verify", [False, True])
def test_a_step_moves_blocks_in_the_order_of_its_plan(stores, verify):
    gpu, cpu = stores
    swapper = ThreadSwapper(gpu, cpu, verify=verify)
    swapper.begin(StepPlan(1, (), swap_outs=(swap_out(4, 1),)))  # so that block 1 of the CPU tier has a checksum
    assert swapper.finish() == ()
    wait_for_layer = swapper.begin(
        StepPlan(
            2,
            (),
            evictions=(swap_out(0, 3),),  # GPU block 0 goes out ...
            local_copies=(local_copy(0, 2), local_copy(2, 5)),  # ... is copied before it is overwritten, as 2 is ...
            swap_ins=(swap_in(1, 0), swap_in(3, 4)),  # ... filled anew, and comes back elsewhere
            swap_outs=(swap_out(1, 0),),
        )
    )
    assert wait_for_layer is not None
    for layer in range(len(LAYERS)):
        wait_for_layer(layer)
    assert swapper.finish() == ()
    assert contents(gpu) == [4.0, 1.0, 0.0, 3.0, 0.0, 2.0]
    assert contents(cpu) == [1.0, 4.0, 102.0, 0.0, 104.0]
    swapper.shutdown()


def test_the_copies_of_each_direction_are_timed(stores, monkeypatch):
    """By a clock that goes on by one second whenever it is looked at."""
    now = itertools.count()
    monkeypatch.setattr("engine.executor.tiers.swapper.time.perf_counter", lambda: float(next(now)))
    swapper = ThreadSwapper(*stores, verify=False)
    try:
        swapper.begin(StepPlan(1, (), evictions=(swap_out(0, 3),), swap_outs=(swap_out(4, 1),)))
        swapper.finish()
        assert swapper.seconds == (0.0, 2.0)
        swapper.begin(StepPlan(2, (), swap_ins=(swap_in(1, 0),)))
        swapper.finish()
        assert swapper.seconds == (1.0, 0.0)
        swapper.begin(StepPlan(3, ()))
        swapper.finish()
        assert swapper.seconds == (0.0, 0.0)
    finally:
        swapper.shutdown()


def test_a_corrupted_block_is_reported_by_its_target(stores):
    gpu, cpu = stores
    swapper = ThreadSwapper(gpu, cpu, verify=True)
    swapper.begin(StepPlan(1, (), swap_outs=(swap_out(1, 1), swap_out(2, 2))))
    assert swapper.finish() == ()
    cpu.storage[2, 7] += 1
    swapper.begin(StepPlan(2, (), swap_ins=(swap_in(1, 4), swap_in(2, 5))))
    assert swapper.finish() == (5,)
    swapper.shutdown()


def test_a_copy_that_fails_reaches_whoever_waits_and_the_step(stores):
    gpu, cpu = stores
    swapper = ThreadSwapper(gpu, cpu, verify=False)
    wait_for_layer = swapper.begin(StepPlan(1, (), swap_ins=(swap_in(99, 0),)))
    assert wait_for_layer is not None
    with pytest.raises(RuntimeError, match="swap-in failed"):
        wait_for_layer(0)
    with pytest.raises(IndexError):
        swapper.finish()
    assert swapper.finish() == ()  # the next step starts clean
    swapper.shutdown()


THREADS = """
import os, torch
from engine.attention.protocol import LayerShape
from engine.core.plan import BlockCopy, StepPlan
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.swapper import ThreadSwapper
num_tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
sizes = {"num_blocks": 2, "chunk_size": 32, "dtype": torch.bfloat16, "device": torch.device("cpu")}
gpu, cpu = (KVStore([LayerShape(16, 128, 128)] * 2, **sizes) for _ in range(2))
gpu.storage.fill_(1)
swapper = ThreadSwapper(gpu, cpu, verify=False)
before = num_tasks()
swapper.begin(StepPlan(1, (), swap_outs=(BlockCopy("gpu", 0, "cpu", 0),)))
swapper.finish()
swapper.begin(StepPlan(2, (), swap_ins=(BlockCopy("cpu", 0, "gpu", 1),)))
swapper.finish()
print(num_tasks() - before, int(gpu.storage[1].float().mean()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_copies_start_no_openmp_team():
    """The two threads of the swapper, and none beside."""
    process = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["2", "1"]


def test_a_gate_opens_for_its_layer_alone():
    gates = LayerGates(2)
    gates.open(1)
    gates.wait(1)
    assert not gates._gates[0].is_set()


FACTS = ("my cat is called Mia", "the code of my locker is 4711", "my brother is named Tom")


def answer_after_corruption(*, verify_swaps: bool) -> tuple[str, dict]:
    """Tell facts, push them out to the CPU tier, flip bytes there, ask."""
    with create_server(
        num_threads=1, num_gpu_blocks=40, num_cpu_blocks=200, chunk_size=8, max_model_len=320, verify_swaps=verify_swaps
    ) as server:
        for fact in FACTS:
            server.process_request("ada", fact)
        for i in range(12):
            server.process_request(f"other-{i}", f"the code of my house is {1000 + i} " * 4)
        cpu = server.engine._executor.cpu_store
        bits = cpu.storage.view(torch.int32)
        bits ^= 0x3F00_0000
        sampling = SamplingParams(temperature=0.0, max_tokens=20)
        answer = server.chat("ada", "what is the code of my locker?", sampling)
        assert server.get_statistics()["num_cpu_cached_tokens"] > 0
        return answer.text, server.get_statistics()


def test_blocks_that_a_step_waited_for_are_counted_apart_from_those_copied_ahead_of_time():
    """Long prompts need more blocks at once than are copied ahead of them."""
    options = {
        "chunk_size": 8,
        "max_model_len": 190,
        "swap_out_watermark": 0.02,
        "max_swap_outs": 1,
        "write_through": False,
    }
    with create_server(num_threads=1, num_gpu_blocks=24, num_cpu_blocks=90, **options) as server:
        for name in range(8):
            server.process_request(
                f"session-{name}", f"the code of my house is {1000 + name} " * (1 if name < 6 else 4)
            )
        statistics, executor = server.get_statistics(), server.engine._executor
        assert 0 < statistics["evictions"]["gpu_swapped_out"] < statistics["num_swap_outs"]
        num_bytes = statistics["evictions"]["gpu_swapped_out"] * executor.bytes_per_block
        assert statistics["num_awaited_swap_out_bytes"] == num_bytes


def test_a_corrupted_swap_shows_in_the_answer():
    text, _ = answer_after_corruption(verify_swaps=False)
    assert "4711" not in text


def test_verified_swaps_are_dropped_recomputed_and_counted():
    text, stats = answer_after_corruption(verify_swaps=True)
    assert "4711" in text
    assert stats["num_corrupted_swaps"] > 0
    assert stats["num_resumed_tokens"] > 0
