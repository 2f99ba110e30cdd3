"""A tensor-parallel group as its owner sees it: who has what, and what happens when a rank is lost, fails or hangs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.executor_protocol import ComputationFailedError
from engine.core.plan import BlockCopy, ChunkRecord, QuerySegment, RequestStart, SlowTransfer, StepPlan, TransferEnd
from engine.core.request import SamplingParams
from engine.core.tier_table import CPU
from engine.errors import ConfigError, EngineError, EngineStoppedError, ModelLoadError, UnsupportedModelError
from engine.executor import group, model_runner, plan_channel
from engine.executor.group import GroupExecutor, ProcessWorkers, make_disk_tier
from engine.executor.local import LocalExecutor
from engine.executor.tiers.disk_tier import DISK
from engine.generation import Generation
from engine.text.prompt import TextPrompt
from tests.conftest import save_tiny_model
from tests.copies import swap_in, swap_out

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs each rank takes one")

WAIT_S = 60
GREEDY = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
FIRST = StepPlan(
    0,
    (QuerySegment("a", 0, tuple(range(3, 19)), samples=True),),
    (RequestStart("a", 16, 16, GREEDY, (), (2, 0, 1, 3)),),
)


def decode(step_id: int) -> StepPlan:
    return StepPlan(step_id, (QuerySegment("a", 15 + step_id, None, samples=True),))


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def temporary(monkeypatch, tmp_path_factory) -> Iterator[Path]:
    """Where groups keep their files; afterwards none is left."""
    tmp_path_factory.getbasetemp()  # which is made on first use, and not to be in there
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)
        assert not list(Path(folder).iterdir())


@pytest.fixture
def make_group(tiny_model, warm_workers, temporary) -> Iterator[Callable[..., GroupExecutor]]:
    """(model, fault of rank 1, host of rank 0 for the others, options) -> a group, shut down at the end."""
    groups: list[GroupExecutor] = []

    def make(
        model: Path | None = None, fault: str | None = None, host: str | None = None, **options: object
    ) -> GroupExecutor:
        options = {"chunk_size": 8, "num_gpu_blocks": 16, "num_cpu_blocks": 8, "tensor_parallel_size": 2, **options}
        model = model or tiny_model("llama")
        config = EngineConfig.from_options({"model": str(model), "dtype": "float32", "num_threads": 1, **options})
        starter = warm_workers.starter(fault)
        starter.host = host
        groups.append(GroupExecutor(config, starter))
        return groups[-1]

    yield make
    for executor in groups:
        if not executor.broken.cancelled():  # by a shutdown in the test
            executor.shutdown()
    assert not torch.distributed.is_initialized()


def assert_broken(executor: GroupExecutor, outcome: Future, message: str) -> None:
    """The step ends with an error that says which rank, and so does everything after it."""
    with pytest.raises(EngineStoppedError, match=message):
        outcome.result(WAIT_S)
    with pytest.raises(EngineStoppedError, match=message):
        executor.check_health()
    assert executor.broken.result(0) is not None
    with pytest.raises(EngineStoppedError, match=message):
        executor.execute(decode(1))


@pytest.mark.parametrize(("family", "size"), [("llama", 2), ("gpt2", 4)])
def test_each_rank_has_its_share_of_weights_and_kv(family, size, tmp_path, make_group):
    shape = {"hidden_size": 128, "intermediate_size": 256} if family == "llama" else {"n_embd": 128}
    model = save_tiny_model(family, tmp_path, **shape)
    executor = make_group(model, tensor_parallel_size=size)
    whole = LocalExecutor(
        EngineConfig(
            model=str(model), dtype="float32", chunk_size=8, num_gpu_blocks=16, num_cpu_blocks=8, num_threads=1
        )
    )
    # Norms and what is added once are everywhere, and so are GPT-2's positions.
    replicated = sum(
        weights.nbytes
        for name, weights in AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters()
        if weights.ndim == 1 or ".wpe." in name
    )
    share = (whole.placement.num_weight_bytes - replicated) / size
    assert [placement.rank for placement in executor.placements] == list(range(size))
    assert len({placement.pid for placement in executor.placements}) == size
    for placement in executor.placements:
        assert placement.num_gpu_tier_bytes == whole.placement.num_gpu_tier_bytes / size
        assert placement.num_cpu_tier_bytes == whole.placement.num_cpu_tier_bytes / size
        assert placement.num_weight_bytes - replicated == pytest.approx(share, rel=0.05)
    assert executor.facts.bytes_per_block == whole.bytes_per_block
    whole.shutdown()


def test_a_kv_head_may_be_on_several_ranks(make_group):
    """Two KV heads, four ranks: each pool holds one."""
    executor = make_group(tensor_parallel_size=4)
    assert {layer.num_kv_heads for layer in executor.local.loaded.layers} == {1}
    assert len({placement.num_gpu_tier_bytes for placement in executor.placements}) == 1


def test_the_size_of_the_cpu_tier_is_of_all_ranks_together(make_group):
    options = {"num_cpu_blocks": None, "kv_offloading_size": 1 / 1024}
    executor = make_group(**options)
    total = sum(placement.num_cpu_tier_bytes for placement in executor.placements)
    assert 0 <= (1 << 20) - total < executor.facts.bytes_per_block


def test_a_block_that_one_worker_finds_damaged_is_told(make_group, tiny_model):
    """What was never swapped out has no checksum: on every rank it is another block than was swapped out."""
    executor = make_group(verify_swaps=True)
    copy = swap_out(2, 5)
    executor.execute(FIRST)
    executor.execute(StepPlan(1, (), swap_outs=(copy,)))
    assert executor.execute(StepPlan(2, (), swap_ins=(swap_in(5, 4),))).failed_swap_ins == ()
    assert executor.execute(StepPlan(3, (), swap_ins=(swap_in(6, 7),))).failed_swap_ins == (7,)


@pytest.mark.parametrize("host", [None, "127.0.0.1"], ids=["unix", "tcp"])
def test_a_transfer_to_the_disk_waits_for_a_copy_of_the_workers_step(make_group, tmp_path, host):
    """Rank 0 has made its own when the step's result is there; with checksums, a block without its content is noticed."""
    options = {"chunk_size": 8, "kv_disk_path": str(tmp_path), "kv_disk_size": 0.01}
    executor = make_group(fault="slow copies", host=host, verify_swaps=True, **options)
    tier = make_disk_tier(EngineConfig.from_options(options), executor, 0)
    assert tier is not None
    tier.run(lambda _: None)
    record = ChunkRecord(key=bytes(32), parent_key=bytes(32), position=0, num_tokens=8, owner_id=None, idle_s=0.0)
    executor.execute(FIRST)
    told: list[TransferEnd] = []
    for number in range(3):
        executor.execute(StepPlan(1 + number, (), swap_outs=(swap_out(2, number),)))
        copy = BlockCopy(CPU, number, DISK, number)
        tier.start(SlowTransfer(transfer_id=number, record=record, copy=copy))
        wait_until(lambda: bool(ends := tier.poll()) and not told.extend(ends))
    assert [end.ok for end in told] == [True] * 3
    tier.close()


def test_workers_may_come_over_the_network(make_group):
    local = make_group()
    expected = [local.execute(plan).token_ids for plan in (FIRST, decode(1), decode(2))]
    local.shutdown()
    remote = make_group(host="127.0.0.1")
    assert [remote.execute(plan).token_ids for plan in (FIRST, decode(1), decode(2))] == expected


def test_a_killed_worker_breaks_the_group_at_once(make_group):
    executor = make_group()
    executor.execute(FIRST)
    told: Future = Future()
    executor.broken.add_done_callback(told.set_result)
    os.kill(executor.placements[1].pid, signal.SIGKILL)
    assert_broken(executor, executor.submit(decode(1)), "rank 1 of 2: its process has ended")
    assert told.result(WAIT_S) is executor.broken


def test_a_stopped_worker_breaks_the_group(make_group, monkeypatch):
    monkeypatch.setattr(plan_channel, "LOST_AFTER_S", 3.0)
    executor = make_group()
    executor.execute(FIRST)
    pid = executor.placements[1].pid
    os.kill(pid, signal.SIGSTOP)
    assert_broken(executor, executor.submit(decode(1)), "rank 1 of 2: it has not answered")
    wait_until(lambda: not is_alive(pid))


def test_a_worker_that_fails_breaks_the_group_and_says_why(make_group):
    executor = make_group(fault="raise")
    executor.execute(FIRST)
    assert_broken(executor, executor.submit(decode(1)), r"rank 1 of 2: .*injected fault")


def test_a_worker_that_hangs_breaks_the_group(make_group, monkeypatch):
    """Its heart beats on."""
    monkeypatch.setattr(group, "STEP_TIMEOUT_S", 1.5)
    executor = make_group(fault="hang")
    executor.execute(FIRST)
    assert_broken(executor, executor.submit(decode(1)), "rank 1 of 2: step 1 does not end")


def test_a_failure_of_rank_0_amid_its_computation_breaks_the_group(make_group, monkeypatch):
    monkeypatch.setattr(group, "BLAME_TIMEOUT_S", 0.2)
    executor = make_group()
    executor.execute(FIRST)
    pid = executor.placements[1].pid

    def explode(*_: object) -> None:
        raise RuntimeError("injected fault")

    monkeypatch.setattr(executor.local.runner, "_forward", explode)
    assert_broken(executor, executor.submit(decode(1)), r"rank 0 of 2: .*injected fault")
    wait_until(lambda: not is_alive(pid))


def test_a_failure_after_the_last_collective_ends_that_step_alone(make_group, monkeypatch):
    executor = make_group()
    expected = [executor.execute(plan).token_ids for plan in (FIRST, decode(1))]

    def explode(*_: object) -> None:
        raise RuntimeError("injected fault")

    with monkeypatch.context() as patch:
        patch.setattr(model_runner.ModelRunner, "_sample", explode)
        with pytest.raises(ComputationFailedError, match="injected fault"):
            executor.execute(decode(2))
    executor.check_health()
    ended = StepPlan(3, FIRST.segments, FIRST.starts, ended=("a",))
    assert [executor.execute(plan).token_ids for plan in (ended, decode(1))] == expected


def test_a_model_that_cannot_be_shared_is_refused(make_group, tmp_path):
    """Before a worker starts."""
    cases = {
        "gptj": ({}, 2, "neither transformers nor this engine has a tensor-parallel plan"),
        "llama": ({"num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": 6}, 4, "6 attention heads"),
        "qwen3": ({"num_attention_heads": 12, "num_key_value_heads": 3}, 4, "3 KV heads"),
    }
    for family, (shape, size, message) in cases.items():
        model = save_tiny_model(family, tmp_path / family, **shape)
        with pytest.raises(UnsupportedModelError, match=f"{family}.*{message}"):
            make_group(model, tensor_parallel_size=size)


def test_a_model_without_its_weights_is_refused(make_group, tiny_model, tmp_path):
    with pytest.raises(ModelLoadError, match="neither a local folder"):
        make_group(tmp_path / "nothing")
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "llama")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelLoadError, match="cannot load a model"):
        make_group(folder)


def test_a_process_is_in_one_group_at_a_time(make_group):
    make_group()
    with pytest.raises(ConfigError, match="rank of another"):
        make_group()


def test_a_worker_that_does_not_start_is_no_reason_to_wait(tiny_model, monkeypatch, temporary):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="rank 1 ended at its start"):
        GroupExecutor(EngineConfig(model=str(tiny_model("llama")), tensor_parallel_size=2), ProcessWorkers())


def test_workers_end_and_nothing_stays_when_rank_0_is_gone(tiny_model, tmp_path):
    script = (
        "import os, sys\n"
        "from engine.config import EngineConfig\n"
        "from engine.executor.group import GroupExecutor\n"
        "config = EngineConfig(model=sys.argv[1], tensor_parallel_size=2, num_gpu_blocks=4, num_threads=1)\n"
        "print(GroupExecutor(config).placements[1].pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    rank_0 = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model("llama"))],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert rank_0.returncode == -signal.SIGKILL, rank_0.stderr
    wait_until(lambda: not is_alive(int(rank_0.stdout)))
    assert not list(tmp_path.iterdir())


async def test_the_engine_ends_its_streams_and_says_which_rank(warm_workers, tiny_model, temporary):
    groups: list[GroupExecutor] = []

    def executor_of(config: EngineConfig) -> GroupExecutor:
        groups.append(GroupExecutor(config, warm_workers.starter()))
        return groups[-1]

    options = {"chunk_size": 8, "num_gpu_blocks": 64, "num_cpu_blocks": 0, "tensor_parallel_size": 2, "num_threads": 1}
    config = EngineConfig(model=str(tiny_model("llama")), async_scheduling=True, **options)
    engine = AsyncEngine(config, executor_of)
    try:
        stream = engine.generate(Generation("a", None, TextPrompt("hello"), GREEDY))
        await anext(stream)
        os.kill(groups[0].placements[1].pid, signal.SIGKILL)
        with pytest.raises(EngineStoppedError):
            async for _ in stream:
                pass
        with pytest.raises(EngineStoppedError, match="rank 1 of 2"):
            engine.check_health()
    finally:
        await engine.shutdown()
