"""The thesis for a sharded model with a disk tier: each rank keeps its part, and a chunk is there if all ranks have theirs.

With real files and gloo ranks.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.cache.prices import LoadPrices
from engine.core.request import SamplingParams
from engine.executor.group import GroupExecutor
from engine.executor.tiers.disk_format import PAGE_BYTES
from engine.executor.tiers.disk_tier import DISK
from tests.engine.test_disk_tier import DiskDriver, say, served
from tests.engine.test_equivalence import assert_same_tokens
from tests.engine.test_tensor_parallel import OPTIONS, converse, sampling_of
from tests.nightly import IS_NIGHTLY, nightly

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs each rank takes one")

TIERS = {"num_gpu_blocks": 24, "num_cpu_blocks": 30, "kv_disk_size": 0.01}
GREEDY = SamplingParams(temperature=0.0, max_tokens=7, logprobs=2)
NUM_PROMPTS = 6
# Far longer than anything here takes.
PATIENCE_S = 60.0
PROMPT_LEN = 64
# Family, ranks, whether blocks have checksums, fault of rank 1.
GROUPS: list[tuple[str, int, bool, str | None]] = [("llama", 2, False, "flaky")]
if IS_NIGHTLY:
    GROUPS += [
        ("llama", 4, True, None),
        ("llama", 2, True, "slow copies"),
        ("gpt2", 4, False, None),
        ("qwen3", 2, True, None),
    ]


@pytest.fixture(scope="module", autouse=True)
def any_load_is_cheap() -> Iterator[None]:
    """However busy the machine is: what is observed does not count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadPrices, "note_load", lambda *_: None)
        patch.setattr("engine.executor.tiers.disk_tier.MAX_WAIT_S", 60.0)
        yield


@pytest.fixture(scope="module")
def start(tiny_model, warm_workers) -> Callable[..., DiskDriver]:
    """(path, options) -> a group with its disk tier there; its owner ends it."""

    def start(path: Path, family: str = "llama", fault: str | None = None, **options: object) -> DiskDriver:
        config = EngineConfig.from_options(
            {
                "model": str(tiny_model(family)),
                "dtype": "float32",
                "num_threads": 1,
                "tensor_parallel_size": 2,
                "decode_reserve": 0.02,
                "max_num_queued_reqs": 1024,
                "kv_disk_path": str(path),
                **TIERS,
                **OPTIONS,
                **options,
            }
        )
        return DiskDriver(config, GroupExecutor(config, warm_workers.starter(fault)))

    return start


@pytest.mark.parametrize(("family", "size", "verify_swaps", "fault"), GROUPS)
def test_ranks_equal_one_process_before_and_after_a_restart(
    family, size, verify_swaps, fault, tiny_model, make_driver, start, tmp_path, monkeypatch
):
    for pause in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(f"engine.core.cache.slow_transfers.{pause}", 0.02)
    options = {"family": family, "tensor_parallel_size": size, "verify_swaps": verify_swaps, "fault": fault}
    whole = make_driver(tiny_model(family), num_gpu_blocks=200, mode="stateless", **OPTIONS)
    kept = start(tmp_path, **options)
    prompts = converse(kept, random.Random(family))
    for request_id, prompt in prompts.items():
        whole.add(request_id, prompt, None, sampling_of(request_id))
        whole.run()
    num_ties = sum(assert_same_tokens(kept, whole, request_id) for request_id in prompts)
    kept.end(drains=True)
    counts = kept.core.get_statistics()["slow_transfers"]
    assert min(counts[f"{DISK}_loaded"], counts[f"{DISK}_stored"]) > 0
    assert bool(counts[f"{DISK}_store_failed"]) == (fault == "flaky")

    again = start(tmp_path, **options)
    for request_id, prompt in prompts.items():
        again.add(request_id, prompt, None, sampling_of(request_id))
        again.step()
    again.run()
    num_ties += sum(assert_same_tokens(again, whole, request_id) for request_id in prompts)
    assert num_ties <= 2
    stats = again.core.get_statistics()
    assert stats[f"num_{DISK}_cached_tokens"] > 0
    assert stats["num_corrupted_swaps"] == 0
    assert bool(stats["slow_transfers"][f"{DISK}_load_failed"]) == (fault == "flaky")
    again.core.check_integrity()
    again.end(drains=False)


# -- a rank whose part is not what it was ----------------------------------------------------------------------------------


def ask(driver: DiskDriver, names: range) -> dict[str, list[int]]:
    """One prompt after the other; the answers."""
    answers = {}
    for name in names:
        prompt = random.Random(name).choices(range(3, 250), k=PROMPT_LEN)
        answers[str(name)] = driver.generate(str(name), prompt, conversation_id=f"c{name}", sampling=GREEDY)
    return answers


class Kept:
    """What a group has left. folder: its files. older: as they were when it had half of them. answers: of both halves."""

    def __init__(self, start: Callable[..., DiskDriver], path: Path) -> None:
        self.folder, self.older = path / "kv", path / "older"
        first, second = range(NUM_PROMPTS // 2), range(NUM_PROMPTS // 2, NUM_PROMPTS)
        driver = start(self.folder)
        self.answers = ask(driver, first)
        driver.end(drains=True)
        shutil.copytree(self.folder, self.older)
        driver = start(self.folder)
        self.answers |= ask(driver, second)
        driver.end(drains=True)


@pytest.fixture(scope="module")
def kept(start, tmp_path_factory) -> Kept:
    return Kept(start, tmp_path_factory.mktemp("kept"))


def part_of(path: Path, rank: int) -> Path:
    (folder,) = path.glob(f"*-0-rank{rank}")
    return folder


def segments(path: Path, rank: int) -> list[Path]:
    return sorted(part_of(path, rank).glob("*.kv"))


def rows_end(file: Path) -> int:
    """Where the slots begin."""
    content = file.read_bytes()
    return max(i + PAGE_BYTES for i in range(0, len(content), PAGE_BYTES) if content[i : i + 6] == b"PENSKV")


def spoil(path: Path, kept: Kept, fault: str) -> None:
    """Do something to the part of rank 1 alone."""
    files = segments(path, 1)
    assert files
    match fault:
        case "flipped bits in the slots":
            for file in files:
                content, begin = bytearray(file.read_bytes()), rows_end(file)
                content[begin:] = bytes(byte ^ 1 for byte in content[begin:])
                file.write_bytes(content)
        case "cut files":
            for file in files:
                file.write_bytes(file.read_bytes()[: rows_end(file) + PAGE_BYTES])
        case "no rows":
            for file in files:
                file.write_bytes(b"")
        case "no folder":
            shutil.rmtree(part_of(path, 1))
        case "the part of rank 0":
            for file, other in zip(files, segments(path, 0), strict=True):
                shutil.copy(other, file)
        case "an older part":
            shutil.rmtree(part_of(path, 1))
            shutil.copytree(part_of(kept.older, 1), path / part_of(kept.older, 1).name)


@pytest.mark.parametrize(
    ("fault", "num_failed", "is_cached"),
    [
        ("none", 0, [True] * NUM_PROMPTS),
        ("flipped bits in the slots", 1, [False] * NUM_PROMPTS),
        ("cut files", 1, [False] * NUM_PROMPTS),
        ("no rows", 0, [False] * NUM_PROMPTS),
        ("no folder", 0, [False] * NUM_PROMPTS),
        ("the part of rank 0", 0, [False] * NUM_PROMPTS),
        ("an older part", 0, [True] * (NUM_PROMPTS // 2) + [False] * (NUM_PROMPTS // 2)),
    ],
)
def test_a_chunk_that_one_rank_lacks_is_there_on_none(fault, num_failed, is_cached, kept, start, tmp_path):
    path = tmp_path / "kv"
    shutil.copytree(kept.folder, path)
    spoil(path, kept, fault)
    driver = start(path)
    assert ask(driver, range(NUM_PROMPTS)) == kept.answers
    assert [driver.cached[str(name)] >= PROMPT_LEN - OPTIONS["chunk_size"] for name in range(NUM_PROMPTS)] == is_cached
    stats = driver.core.get_statistics()
    assert bool(stats["slow_transfers"][f"{DISK}_load_failed"]) == bool(num_failed)
    driver.core.check_integrity()
    driver.end(drains=False)


# -- a rank whose disk fails -----------------------------------------------------------------------------------------------


def ask_until(driver: DiskDriver, is_over: Callable[[], bool]) -> None:
    """The same prompts again and again, more than the tiers hold."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_over():
        assert time.monotonic() < deadline
        ask(driver, range(NUM_PROMPTS))


def test_one_full_disk_leaves_two_tiers_until_there_is_room(kept, start, tmp_path, monkeypatch):
    for pause in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(f"engine.core.cache.slow_transfers.{pause}", 0.02)
    path = tmp_path / "kv"
    path.mkdir()
    full = path / "full"
    full.touch()
    driver = start(path, fault="disk", num_cpu_blocks=12)
    stats = driver.core.stats.slow_transfers
    assert ask(driver, range(NUM_PROMPTS)) == kept.answers
    ask_until(driver, lambda: driver.disk.problem is not None)
    assert driver.disk.problem == "rank 1: No space left on device"
    assert stats[f"{DISK}_stored"] == 0
    assert ask(driver, range(NUM_PROMPTS)) == kept.answers
    full.unlink()
    ask_until(driver, lambda: bool(stats[f"{DISK}_stored"]))
    assert driver.disk.problem is None
    driver.core.check_integrity()
    driver.end(drains=False)


def test_one_disk_that_hangs_keeps_no_request(kept, start, tmp_path, monkeypatch):
    """It is a miss after a while; no block is given away before that rank has answered."""
    monkeypatch.setattr("engine.executor.tiers.disk_tier.MAX_WAIT_S", 0.1)
    path = tmp_path / "kv"
    shutil.copytree(kept.folder, path)
    hangs = path / "hangs"
    hangs.touch()
    driver = start(path, fault="disk")
    assert ask(driver, range(1)) == {"0": kept.answers["0"]}
    assert driver.cached["0"] == 0
    assert driver.core.get_statistics()["slow_transfers"][f"{DISK}_loaded"] == 0
    assert driver.core.hanging_tiers(driver.now) == [DISK]
    assert driver.disk.problem == "rank 1: a transfer does not end"
    driver.core.check_integrity()
    hangs.unlink()
    deadline = time.monotonic() + PATIENCE_S
    while driver.core.hanging_tiers(driver.now):
        driver.step()
        assert time.monotonic() < deadline
    assert driver.disk.problem is None
    assert ask(driver, range(1, NUM_PROMPTS)).items() <= kept.answers.items()
    assert driver.cached["1"] >= PROMPT_LEN - OPTIONS["chunk_size"]
    driver.end(drains=False)


# -- an engine -------------------------------------------------------------------------------------------------------------


def test_conversations_come_back_with_their_kv_after_a_restart_of_all_ranks(tmp_path, warm_workers, monkeypatch):
    make_group = partial(AsyncEngine, make_executor=lambda config: GroupExecutor(config, warm_workers.starter()))
    monkeypatch.setattr("engine.server.AsyncEngine", make_group)
    messages: dict[str, list[tuple[str, str]]] = {}
    with served(tmp_path, messages, tensor_parallel_size=2) as server:
        say(server, "My name is {}.")
        before = say(server, "What is my name?")
    with served(tmp_path, messages, tensor_parallel_size=2) as server:
        first = say(server, "What is my name?")
        assert server.get_statistics()["tier_problems"] == {}
    assert [answer.num_cached_tokens for answer in first] == [
        answer.num_prompt_tokens + len(answer.token_ids) - 1 for answer in before
    ]
    names = sorted(folder.name.partition("-")[2] for folder in tmp_path.iterdir())
    assert names == ["0-rank0", "0-rank1"]


@nightly
def test_a_group_of_another_size_takes_the_room(tmp_path, start):
    """Its parts are others; files of the former size under the same number go."""
    driver = start(tmp_path)
    ask(driver, range(1))
    driver.end(drains=True)
    before = {folder.name for folder in tmp_path.iterdir()}
    driver = start(tmp_path, tensor_parallel_size=4)
    ask(driver, range(1))
    assert driver.cached["0"] == 0
    driver.end(drains=True)
    after = {folder.name for folder in tmp_path.iterdir()}
    assert len(before) == 2
    assert len(after) == 4
    assert not before & after
