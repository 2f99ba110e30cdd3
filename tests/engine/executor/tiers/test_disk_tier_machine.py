"""A state machine over a core with a real disk tier: whatever happens to disk and process, every answer is right.

The disk's threads are the machine's rules, so that transfers end at any time between steps. Calls of the system fail, are
short, or end the process with a part of their pages written; files are damaged, cut, removed; the process is killed and
started again at any moment, or drained. A slot of the CPU tier holds the context up to its token, as in ContextExecutor: a
step that reads a wrong or stale one fails at once.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.attention.protocol import LayerShape
from engine.core.cache.prices import LoadPrices
from engine.core.config import CacheConfig, SchedulingConfig
from engine.executor.tiers import disk_store
from engine.executor.tiers.disk_format import PAGE_BYTES, Layout
from engine.executor.tiers.disk_store import DiskStore
from engine.executor.tiers.disk_tier import DISK, DiskTier, _Stop
from engine.executor.tiers.kv_store import KVStore
from tests.engine.core.conftest import CoreDriver, answer_to
from tests.nightly import IS_NIGHTLY

CHUNK_SIZE, SLOT_BYTES = 4, 512
NUM_GPU_BLOCKS, WINDOW = 8, 30
SYSTEM_PROMPT = (1, 2, 3, 4, 5, 6)
CALLS = ("open", "preadv", "pwritev", "posix_fallocate", "fstatvfs")
CODES = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE, errno.EACCES)

FAST_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None
harms = st.tuples(st.sampled_from(["flip", "flip", "flip", "cut", "remove", "remove all"]), st.integers(0, 1000))


class Killed(BaseException):
    """The process ends here."""


class SlotsInMemory:
    """The slots of the CPU tier, in the memory that the disk tier reads and writes: contexts of tokens below 256."""

    def __init__(self, store: KVStore) -> None:
        ((keys, values),) = store.layer_pools
        self._keys, self._values = keys.numpy(), values.numpy()

    def __getitem__(self, block: int) -> list[tuple[int, ...]]:
        slots = []
        for key, value in zip(self._keys[block, 0], self._values[block, 0], strict=True):
            assert bytes(key) == bytes(value), "two halves of different contents"
            slots.append(tuple(map(int, key[1 : 1 + key[0]])))
        return slots

    def __setitem__(self, block: int, contexts: list[tuple[int, ...]]) -> None:
        for slot, context in enumerate(contexts):
            content = bytes([len(context), *context]).ljust(SLOT_BYTES, b"\0")
            for pool in (self._keys, self._values):
                pool[block, 0, slot] = bytearray(content)


class Faults:
    """What the system's calls do.

    call: this one fails, with `code`, the next `num_left` times; "short" = so do writes and reads, which are short; "kill" =
        the process ends in the write that finds none left, and some pages of it are written. None = all is well.
    """

    def __init__(self) -> None:
        self.call: str | None = None
        self.code = errno.EIO
        self.num_left = 0
        self.rng = random.Random(0)

    @contextmanager
    def active(self) -> Iterator[None]:
        """As long as the disk works."""
        calls = {name: getattr(os, name) for name in CALLS}

        def make(name: str):
            def call(*arguments, **options):
                is_short = self.call == "short" and name in ("preadv", "pwritev")
                if name == "pwritev" and self.call == "kill":
                    return self._write_and_end(calls["pwritev"], *arguments)
                if not self.num_left or not (is_short or name == self.call):
                    return calls[name](*arguments, **options)
                self.num_left -= 1
                if is_short:
                    descriptor, buffers, offset = arguments
                    return calls[name](descriptor, [buffers[0][: PAGE_BYTES // 2]], offset)
                raise OSError(self.code, os.strerror(self.code))

            return call

        with mock.patch.multiple(os, **{name: make(name) for name in CALLS}):
            yield

    def _write_and_end(self, pwritev, descriptor: int, buffers, offset: int) -> int:
        if self.num_left:
            self.num_left -= 1
            return pwritev(descriptor, buffers, offset)
        pages = [
            buffer[start : start + PAGE_BYTES] for buffer in buffers for start in range(0, len(buffer), PAGE_BYTES)
        ]
        for index in self.rng.sample(range(len(pages)), self.rng.randint(0, len(pages))):
            pwritev(descriptor, [pages[index]], offset + index * PAGE_BYTES)
        raise Killed


class DiskTierMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("engine.executor.tiers").setLevel(logging.CRITICAL)
        self.folder = Path(tempfile.mkdtemp(dir=FAST_DISK, prefix="disk-machine-"))
        self.faults = Faults()
        # So that there are several segments.
        self.patches = ExitStack()
        self.patches.enter_context(mock.patch("engine.executor.tiers.disk_format.SEGMENT_BYTES", 8 * PAGE_BYTES))
        self.patches.enter_context(mock.patch.multiple(disk_store, MIN_FREE_BYTES=0, MIN_FREE_SHARE=0.0))
        # However busy the machine is, any load is cheap.
        self.patches.enter_context(mock.patch.object(LoadPrices, "note_load"))
        self.histories: list[tuple[str, tuple[int, ...]]] = []
        self.open: dict[str, tuple[str, tuple[int, ...], int]] = {}
        self.num_requests = 0
        self.driver: CoreDriver | None = None

    @initialize(num_cpu_blocks=st.integers(1, 6), num_disk_blocks=st.sampled_from([2, 6, 30, 30]), later=st.booleans())
    def begin(self, num_cpu_blocks: int, num_disk_blocks: int, later: bool) -> None:
        self.sizes = num_cpu_blocks, num_disk_blocks
        self.start(is_told_later=later)

    def start(self, *, is_told_later: bool) -> None:
        """A process, which finds what lies in the folder, before its first requests or in the midst of them."""
        self.num_turns = 0
        num_cpu_blocks, num_disk_blocks = self.sizes
        shape = LayerShape(num_kv_heads=1, k_dim=SLOT_BYTES, v_dim=SLOT_BYTES)
        cpu = KVStore(
            [shape],
            num_blocks=num_cpu_blocks,
            chunk_size=CHUNK_SIZE,
            dtype=torch.uint8,
            device=torch.device("cpu"),
        )
        cpu.storage.fill_(3)  # what another process had there
        layout = Layout(b"m" * 16, 2 * CHUNK_SIZE * SLOT_BYTES, num_disk_blocks, CHUNK_SIZE)
        self.store = DiskStore(self.folder / "kv", layout)
        with self.faults.active():
            self.tier = DiskTier(self.store, cpu)
        now = 0.0 if self.driver is None else self.driver.now
        cache = CacheConfig(
            chunk_size=CHUNK_SIZE,
            num_gpu_blocks=NUM_GPU_BLOCKS,
            num_cpu_blocks=num_cpu_blocks,
            slow_tiers=(self.tier.spec,),
            swap_out_watermark=0.6,
        )
        self.driver = CoreDriver(cache, SchedulingConfig(max_model_len=WINDOW, max_num_seqs=4, decode_reserve=0.0))
        self.driver.now = now
        self.driver.executor.cpu_slots = SlotsInMemory(cpu)
        self.driver.loop._transport = self.tier
        self.core = self.driver.core
        self.core.await_records(DISK)
        with self.faults.active():
            self.found = list(self.store.scan())
        if not is_told_later:
            self.tell_records()

    def tell_records(self) -> None:
        for records in self.found:
            self.core.restore(DISK, records, self.driver.now)
        self.found = []

    def work(self, *, loads: bool, stores: bool) -> None:
        """All that the threads have to do."""
        with self.faults.active():
            for queue, is_load in ((self.tier._loads, True), (self.tier._stores, False)):
                if loads if is_load else stores:
                    queue.put(_Stop())
                    self.tier._work(queue, is_load=is_load)

    # -- traffic -------------------------------------------------------------------------------------------------------

    @rule(pick=st.integers(0, 7), new=st.lists(st.integers(1, 3), min_size=1, max_size=9), max_tokens=st.integers(1, 5))
    def ask(self, pick: int, new: list[int], max_tokens: int) -> None:
        """A turn of a conversation that there is, or of a new one."""
        conversation, history = f"c{self.num_requests}", SYSTEM_PROMPT
        if self.histories and pick < 6:
            conversation, history = self.histories[-1 - pick % len(self.histories)]
        prompt = (*history, *new)
        if len(prompt) + max_tokens > WINDOW:
            prompt = prompt[: WINDOW - max_tokens]
        name = f"r{self.num_requests}"
        self.num_requests += 1
        self.driver.add(name, prompt, max_tokens, conversation_id=conversation)
        self.open[name] = conversation, prompt, max_tokens

    @rule(
        picks=st.lists(st.integers(0, 7), min_size=1, max_size=4),
        new=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    )
    def hold_turns(self, picks: list[int], new: list[int]) -> None:
        """Some conversations one after the other, while the disk works after each step."""
        self.num_turns += len(picks)
        for pick in picks:
            self.ask(pick, new, 2)
            for _ in range(20):
                self.driver.step()
                self.work(loads=True, stores=True)
                if not self.core.has_requests:
                    break
        self.check_answers()

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.driver.step()
        self.check_answers()

    def check_answers(self) -> None:
        for name, (conversation, prompt, max_tokens) in list(self.open.items()):
            if name in self.driver.finished:
                answer = answer_to(prompt, max_tokens)
                assert self.driver.tokens[name] == answer
                self.histories.append((conversation, prompt + answer))
                del self.open[name]

    @rule(loads=st.booleans(), stores=st.booleans())
    def let_the_disk_work(self, loads: bool, stores: bool) -> None:
        self.work(loads=loads, stores=stores)

    @rule(seconds=st.sampled_from([1.0, 20.0, 4000.0]))
    def wait(self, seconds: float) -> None:
        """Deadlines pass, and the pauses that the tier is given after failures."""
        self.driver.now += seconds

    @precondition(lambda self: self.found)
    @rule()
    def finish_the_scan(self) -> None:
        self.tell_records()

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.faults.call)
    @rule(call=st.sampled_from(["short", *CALLS]), code=st.sampled_from(CODES), num_calls=st.sampled_from([1, 2, 1000]))
    def let_calls_fail(self, call: str, code: int, num_calls: int) -> None:
        self.faults.call, self.faults.code, self.faults.num_left = call, code, num_calls

    @precondition(lambda self: self.faults.call)
    @rule()
    def mend(self) -> None:
        self.faults.call = None

    @rule(harm=harms)
    def harm_files(self, harm: tuple[str, int]) -> None:
        kind, seed = harm
        rng = random.Random(seed)
        files = sorted(self.folder.rglob("*.kv"))
        if kind == "remove all":
            shutil.rmtree(self.folder / "kv", ignore_errors=True)
        if not files or kind == "remove all":
            return
        file = rng.choice(files)
        size = file.stat().st_size
        if kind == "remove":
            file.unlink()
        elif kind == "cut":
            os.truncate(file, rng.randrange(0, size + 1, 512))
        elif size:
            with open(file, "r+b") as opened:
                for page in range(0, size, PAGE_BYTES):
                    place = page + rng.randrange(PAGE_BYTES)
                    opened.seek(place)
                    byte = (opened.read(1) or b"0")[0]
                    opened.seek(place)
                    opened.write(bytes([byte ^ (1 << rng.randrange(8)) * (rng.random() < 0.5)]))

    @precondition(lambda self: self.num_turns > 4)
    @rule(num_writes=st.integers(0, 2), seed=st.integers(0, 1000), harm=st.none() | harms, later=st.booleans())
    def kill(self, num_writes: int, seed: int, harm: tuple[str, int] | None, later: bool) -> None:
        """In the midst of a write, if it has that many to do."""
        for pick in range(3):
            self.ask(pick, [2], 1)
            self.step(4)
        self.faults.call, self.faults.num_left, self.faults.rng = "kill", num_writes, random.Random(seed)
        with suppress(Killed):
            self.work(loads=False, stores=True)
        self.restart(harm, later=later)

    @precondition(lambda self: self.num_turns > 4)
    @rule(harm=st.none() | harms, later=st.booleans())
    def drain(self, harm: tuple[str, int] | None, later: bool) -> None:
        """Requests end first; then what the fast tiers hold goes to the disk, if that does not fail."""
        self.finish()
        self.core.start_drain(self.driver.now)
        for _ in range(100):
            if self.core.is_drained(self.driver.now):
                break
            self.driver.step()
            self.work(loads=True, stores=True)
        self.restart(harm, later=later)

    def restart(self, harm: tuple[str, int] | None, *, later: bool) -> None:
        """Conversations come back to the next process."""
        self.faults.call = None
        self.store.close()  # as the system does, of a process that has ended
        self.open.clear()
        if harm is not None:
            self.harm_files(harm)
        self.start(is_told_later=later)
        self.hold_turns([0, 1, 2, 3, 4], [1])

    def finish(self) -> None:
        """All requests end, whether the disk works or hangs."""
        for _ in range(300):
            if not self.core.has_requests:
                break
            if self.driver.step() is None:
                self.driver.now += 5.0
        assert not self.core.has_requests
        self.check_answers()
        assert not self.open

    def teardown(self) -> None:
        try:
            if self.driver is not None:
                self.finish()
                self.faults.call = None
                self.recover()
                self.store.close()
        finally:
            self.patches.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def recover(self) -> None:
        """With a disk that is well again, transfers end well and the tier is in use again."""
        self.tell_records()
        self.work(loads=True, stores=True)
        self.driver.step()
        self.driver.now += 4000.0
        before = self.core.stats.slow_transfers[f"{DISK}_stored"]
        for number in range(4):  # the second turn of each is stored
            for turn in range(2):
                name = f"last {number} {turn}"
                prompt = tuple([50 + number] * 16 + [60] * turn)
                self.driver.add(name, prompt, 1, conversation_id=f"last {number}")
                self.open[name] = f"last {number}", prompt, 1
                for _ in range(12):
                    self.driver.step()
                    self.work(loads=True, stores=True)
                self.check_answers()
        assert not self.open
        assert self.core.stats.slow_transfers[f"{DISK}_stored"] > before
        assert self.tier.problem is None
        assert not self.core.hanging_tiers(self.driver.now)


DiskTierMachine.TestCase.settings = settings(
    max_examples=400 if IS_NIGHTLY else 12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestDiskTierMachine = DiskTierMachine.TestCase
