"""The thesis with a disk behind the CPU tier, and across restarts: greedy output is that of the stateless mode.

With real files, in steps as fast as they go.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.cache.prices import LoadPrices
from engine.core.request import SamplingParams
from engine.errors import ConfigError
from engine.executor.group import GroupExecutor, make_disk_tier
from engine.executor.local import LocalExecutor
from engine.executor.tiers.disk_store import DiskStore
from engine.executor.tiers.disk_tier import DISK, DiskTier
from engine.make_core import make_core
from engine.server import create_server
from engine.statistics_log import statistics_line
from engine.step_loop import LookAhead
from engine.tenant import Tenant
from tests.conftest import Driver
from tests.engine.test_two_tiers import WINDOW, count_ties, run_conversations
from tests.nightly import IS_NIGHTLY

GREEDY = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2)
TINY = {"chunk_size": 8, "max_num_batched_tokens": 64, "max_num_seqs": 6, "max_model_len": WINDOW}
NAMES = ("Mia", "Bob", "Zoe", "Tim", "Eva", "Max")


@pytest.fixture(autouse=True)
def any_load_is_cheap(monkeypatch):
    """However busy the machine is: what is observed does not count."""
    monkeypatch.setattr(LoadPrices, "note_load", lambda *_: None)
    monkeypatch.setattr("engine.executor.tiers.disk_tier.MAX_WAIT_S", 60.0)


class DiskDriver(Driver):
    """With a disk tier, by the clock."""

    def __init__(self, config: EngineConfig, executor: LocalExecutor | GroupExecutor | None = None) -> None:
        """executor: None = a new one, of one rank."""
        executor = executor or LocalExecutor(config)
        self.disk = make_disk_tier(config, executor, 0)
        assert self.disk is not None
        core = make_core(config, executor, (self.disk.spec,))
        super().__init__(executor, core)
        self.loop._transport = self.disk
        core.await_records(DISK)
        found = []
        self.disk.run(found.append)
        for records in found:
            core.restore(DISK, records, self.now)

    @property
    def now(self) -> float:
        return time.monotonic()

    @now.setter
    def now(self, _: float) -> None:
        pass

    def end(self, *, drains: bool) -> None:
        self.run()
        if drains:
            self.core.start_drain(self.now)
            while not self.core.is_drained(self.now):
                self.step()
        self.disk.close()
        self.executor.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("verify_swaps", [True, False] if IS_NIGHTLY else [True])
@pytest.mark.parametrize("family", ["llama", "gpt2"] if IS_NIGHTLY else ["llama"])
def test_three_tiers_equal_stateless_before_and_after_a_restart(
    family, verify_swaps, tiny_model, make_driver, tmp_path
):
    rng = random.Random(f"{family} {verify_swaps}")
    config = EngineConfig(
        model=str(tiny_model(family)),
        dtype="float32",
        num_threads=1,
        num_gpu_blocks=40,
        num_cpu_blocks=60,
        decode_reserve=0.02,
        max_num_queued_reqs=1024,
        verify_swaps=verify_swaps,
        kv_disk_path=str(tmp_path),
        kv_disk_size=0.002,
        **TINY,
    )
    kept = DiskDriver(config)
    kept.loop.look_ahead = LookAhead.LAUNCH if verify_swaps else LookAhead.DRAFT
    fresh = make_driver(tiny_model(family), num_gpu_blocks=250, mode="stateless", **TINY)
    prompts = run_conversations(kept, rng, GREEDY)
    assert count_ties(kept, fresh, prompts, GREEDY) <= len(prompts) // 50
    stats = kept.core.get_statistics()
    assert min(stats["slow_transfers"][f"{DISK}_{what}"] for what in ("loaded", "stored")) > 0
    assert stats[f"num_{DISK}_cached_tokens"] > 0
    assert stats["num_corrupted_swaps"] == 0
    kept.end(drains=True)

    again = DiskDriver(config)
    for request_id, prompt in prompts.items():
        again.add(request_id, prompt, None, GREEDY)
        if rng.random() < 0.5:
            again.step()
    again.run()
    for request_id in prompts:
        pairs = zip(again.outputs[request_id], fresh.outputs[request_id], strict=True)
        for mine, other in pairs:
            if mine.token_id != other.token_id:
                assert other.logprobs.top[0][1] - other.logprobs.top[1][1] < 1e-4, f"{request_id}: {mine} != {other}"
                break
    stats = again.core.get_statistics()
    assert stats[f"num_{DISK}_cached_tokens"] > 0
    assert stats["num_corrupted_swaps"] == stats["slow_transfers"][f"{DISK}_load_failed"] == 0
    again.core.check_integrity()
    again.end(drains=False)


# -- an engine -------------------------------------------------------------------------------------------------------------


def options(path: Path, **changes: object) -> dict[str, object]:
    return {
        "num_threads": 1,
        "dtype": "float32",
        "chunk_size": 8,
        "num_gpu_blocks": 64,
        "num_cpu_blocks": 32,
        "max_model_len": 512,
        "kv_disk_path": str(path),
        "kv_disk_size": 0.01,
        **changes,
    }


@contextmanager
def served(path: Path, messages: dict[str, list[tuple[str, str]]], **changes: object):
    """A server that knows what its sessions have said, and no more; its end is that of a drain."""
    server = create_server(**options(path, **changes))
    server._messages = messages
    try:
        yield server
    finally:
        server.close()


def say(server, text: str) -> list:
    return [server.chat(name, text.format(name), SamplingParams(temperature=0.0, max_tokens=12)) for name in NAMES]


def test_conversations_come_back_with_their_kv_after_a_restart(tmp_path):
    messages: dict[str, list[tuple[str, str]]] = {}
    with served(tmp_path, messages) as server:
        say(server, "My name is {}.")
        before = say(server, "What is my name?")
    with served(tmp_path, messages) as server:
        first = say(server, "What is my name?")
        stats = server.get_statistics()
    assert [answer.num_cached_tokens for answer in first] == [
        answer.num_prompt_tokens + len(answer.token_ids) - 1 for answer in before
    ]
    assert stats["num_disk_cached_tokens"] == sum(answer.num_cached_tokens for answer in first)
    assert (
        stats["slow_transfers"]["disk_loaded"] * server.engine._bytes_per_block
        == (stats["num_slow_transfer_bytes"]["disk_loaded"])
    )
    assert stats["slow_seconds"]["disk_loaded"] > 0
    assert stats["tier_problems"] == {}
    assert f"{stats['num_disk_cached_tokens']} in disk, " in statistics_line(stats)
    assert f"chunks of disk: {stats['slow_transfers']['disk_loaded']} loaded (" in statistics_line(stats)
    with served(tmp_path, {name: turns[:-2] for name, turns in messages.items()}, kv_disk_path=None) as server:
        assert [answer.text for answer in say(server, "What is my name?")] == [answer.text for answer in first]


def test_what_is_written_is_counted(tmp_path):
    with served(tmp_path, {}) as server:
        say(server, "My name is {}.")
    stats = server.get_statistics()  # after the drain
    page_bytes, stored_bytes = 4096, stats["num_slow_transfer_bytes"]["disk_stored"]
    slot_bytes = -(-server.engine._bytes_per_block // page_bytes) * page_bytes
    written = stats["num_written_bytes"]
    assert written["disk_chunks"] == stats["slow_transfers"]["disk_stored"] * (slot_bytes + page_bytes)
    assert written["disk_chunks"] > stored_bytes > 0
    assert 0 < written["disk_transcripts"] < written["disk_chunks"]
    assert "disk tier: " in server.get_statistics_str()


def test_ids_that_tokenising_would_not_give_survive_a_restart(tmp_path, monkeypatch):
    """The answer's text is in a file with its ids; without that file the answers are tokenised anew."""
    messages: dict[str, list[tuple[str, str]]] = {}
    sampling = SamplingParams(
        temperature=2.0, seed=3, max_tokens=40, min_tokens=20
    )  # hardly what a tokenizer would make
    with served(tmp_path, messages) as server:
        before = [server.chat(name, f"My name is {name}.", sampling) for name in NAMES]
    (file,) = tmp_path.glob("*/transcripts.db")
    whole = file.read_bytes()
    expected = [answer.num_prompt_tokens + len(answer.token_ids) - 1 for answer in before]

    def cached() -> list[int]:
        with served(tmp_path, {name: turns[:] for name, turns in messages.items()}) as server:
            return [answer.num_cached_tokens for answer in say(server, "What is my name?")]

    file.write_bytes(b"no database" + whole[11:])
    without = cached()
    assert sum(without) < sum(expected)
    file.write_bytes(whole)
    with_file = cached()
    assert sum(num >= exp - 8 for num, exp in zip(with_file, expected, strict=True)) == len(NAMES)


def test_another_tenant_finds_nothing(tmp_path):
    other = Tenant("other", 1.0)
    text = "My name is Mia, and my cat is called Tom."
    with served(tmp_path, {}) as server:
        server.chat("mine", text)
    with served(tmp_path, {}) as server:
        assert server.chat("theirs", text, tenant=other).num_cached_tokens == 0
        assert server.chat("mine", text).num_cached_tokens > 0


def test_another_model_finds_nothing(tmp_path, tiny_model):
    text = "My name is Mia, and my cat is called Tom."
    with served(tmp_path, {}) as server:
        server.chat("mine", text)
    for changes in ({"dtype": "bfloat16"}, {"chunk_size": 16}, {"model": str(tiny_model("llama"))}):
        with served(tmp_path, {}, **changes) as server:
            assert server.chat("mine", text).num_cached_tokens == 0


def test_two_engines_on_one_path(tmp_path):
    """Each has a folder; after a restart each finds its own if it has the same number."""
    engines = [AsyncEngine(EngineConfig.from_options(options(tmp_path)), number=number) for number in (0, 1)]
    folders = [engine._kept.disk.folder() for engine in engines]
    assert [folder.name.rpartition("-")[2] for folder in folders] == ["0", "1"]
    third = AsyncEngine(EngineConfig.from_options(options(tmp_path)), number=1)
    assert third._kept.disk.folder().name.endswith("-2")

    async def shut_down() -> None:
        for engine in (*engines, third):
            await engine.shutdown()

    asyncio.run(shut_down())


def test_a_disk_that_cannot_be_written_is_told_and_recovers(tmp_path, monkeypatch):
    pwritev, is_full = os.pwritev, True

    def fail(*arguments):
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwritev(*arguments)

    monkeypatch.setattr(os, "pwritev", fail)
    monkeypatch.setattr("engine.core.cache.slow_transfers.FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr("engine.core.cache.slow_transfers.LONGEST_PAUSE_S", 0.05)
    messages: dict[str, list[tuple[str, str]]] = {}
    with served(tmp_path, messages, num_gpu_blocks=64, num_cpu_blocks=8) as server:
        say(server, "My name is {}.")
        assert server.get_statistics()["tier_problems"] == {DISK: "No space left on device"}
        for _ in range(4):
            say(server, "What is my name?")
        assert server.get_statistics()["slow_transfers"]["disk_stored"] == 0
        is_full = False
        deadline = time.monotonic() + 60
        while not server.get_statistics()["slow_transfers"]["disk_stored"] and time.monotonic() < deadline:
            say(server, "What is my name?")
        assert server.get_statistics()["tier_problems"] == {}


@pytest.mark.parametrize("fault", ["not a folder", "read-only"])
def test_an_engine_starts_without_its_disk(tmp_path, monkeypatch, fault):
    path = tmp_path / "kv"
    if fault == "not a folder":
        path.write_text("a file")
    else:

        def refuse(*_: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr("engine.executor.tiers.disk_store.private_folder", refuse)
    with served(path, {}) as server:
        assert server.chat("a", "My name is Mia.").text
        assert list(server.get_statistics()["tier_problems"]) == [DISK]


def test_a_transfer_that_never_ends_keeps_no_request(tmp_path, monkeypatch):
    """Its request computes after a while, the tier is left alone, and that is told."""
    monkeypatch.setattr("engine.executor.tiers.disk_tier.MAX_WAIT_S", 0.2)
    monkeypatch.setattr("engine.executor.tiers.disk_tier.CLOSE_TIMEOUT_S", 0.2)
    messages: dict[str, list[tuple[str, str]]] = {}
    with served(tmp_path, messages) as server:
        say(server, "My name is {}.")
    go = threading.Event()
    read = DiskStore.read

    def hang(*arguments):
        assert go.wait(60)
        return read(*arguments)

    monkeypatch.setattr(DiskStore, "read", hang)
    try:
        with served(tmp_path, messages) as server:
            answers = say(server, "What is my name?")
            assert [answer.num_cached_tokens for answer in answers] == [0] * len(NAMES)
            time.sleep(0.3)
            assert server.get_statistics()["tier_problems"] == {DISK: "a transfer does not end"}
            assert server.get_statistics()["slow_transfers"]["disk_loaded"] == 0
            go.set()
            deadline = time.monotonic() + 60
            while server.get_statistics()["tier_problems"] and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.get_statistics()["tier_problems"] == {}
    finally:
        go.set()


def test_what_a_tail_is_followed_by_stays_in_the_process(tmp_path):
    """The rest of a block may hold what another tenant's tokens left there."""
    with served(tmp_path, {}) as server:
        cpu = server.engine._executor.cpu_store
        cpu.storage.fill_(7.0)
        disk: DiskTier = server.engine._kept.disk
        for block in range(3):
            for pools in cpu.layer_pools:
                for pool in pools:
                    pool[block, :, :5] = 1.0
        content = disk._tails.copy(1, 5)
        values = torch.frombuffer(bytearray(content), dtype=torch.float32)
        assert set(values.tolist()) == {1.0, 0.0}
        assert float(values.mean()) == pytest.approx(5 / 8)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_cpu_blocks": 0}, "needs a CPU tier"),
        ({"kv_disk_size": 1e-7}, "raise it"),
        ({"kv_disk_path": ""}, "the path of a folder"),
        ({"kv_disk_size": 0}, "above 0"),
    ],
)
def test_options_that_make_no_disk_tier(tmp_path, changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        create_server(**options(tmp_path, **changes))


def test_without_the_option_there_is_no_disk_tier(tmp_path):
    with served(tmp_path, {}, kv_disk_path=None) as server:
        assert "num_disk_blocks" not in server.get_statistics()
    with served(tmp_path, {}, mode="stateless") as server:
        assert "num_disk_blocks" not in server.get_statistics()
    assert not list(tmp_path.iterdir())
