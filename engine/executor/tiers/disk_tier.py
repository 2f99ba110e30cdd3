"""The transport of the disk tier: carries out transfers between blocks of the CPU tier and the files, in threads of its own.

The threads touch memory as bytes, never as tensors: torch's operations would start an OpenMP team for each of them. Transfers
of neighbouring blocks go together, because every return from the system waits for the interpreter's lock.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.core.plan import ChunkRecord, SlowTransfer, TransferEnd
from engine.core.tier_table import CPU, TierSpec
from engine.errors import ConfigError
from engine.executor.local import LocalExecutor
from engine.executor.tiers.disk_format import FORMAT_VERSION, Layout
from engine.executor.tiers.disk_store import DiskStore
from engine.executor.tiers.kv_content import TailView, kv_identity
from engine.executor.tiers.kv_store import BlockStore
from engine.executor.tiers.swapper import Checksums

logger = logging.getLogger(__name__)

DISK = "disk"
# The part of kv_disk_size that is for what conversations have said.
TRANSCRIPT_SHARE = 1 / 32
# Loads and stores have threads of their own, so that no load waits for a store.
NUM_LOAD_THREADS = 2
MAX_TRANSFERS_AT_ONCE = 8
# A request waits no longer for it, and after a transfer that takes longer the tier is left alone; in seconds.
MAX_WAIT_S = 10.0
# On average no more is written in so many seconds than the tier holds: a disk wears out.
REWRITE_S = 3600.0
# The first requests should find what is there, but a large tier is scanned while they are served; in seconds.
MAX_SCAN_WAIT_S = 2.0
# How long `close` waits for a transfer that does not end, in seconds.
CLOSE_TIMEOUT_S = 5.0
# Who else has a worker's part of the folder that its rank 0 has is a worker of a group that was killed, and ends within that
# time (plan_channel.END_ALONE_AFTER_S, and the time to close files); in seconds.
FORMER_WORKER_S = 20.0

Records = Mapping[int, ChunkRecord | None]


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class DiskTier:
    """Carries out the transfers of the disk tier.

    spec: of the tier, for the core.
    problem: why chunks are not written at present, or not read; None = all is well. For people.
    read_s: seconds to read a block, measured at the start; None if that was not possible.
    """

    def __init__(self, store: DiskStore, cpu: BlockStore, checksums: Checksums | None = None) -> None:
        """Take the store's folder and measure it. A disk that cannot be used is noted, and tried again with each store.

        cpu: the CPU tier. checksums: of its blocks, if they are verified.
        """
        self.spec = TierSpec(
            name=DISK,
            num_blocks=store.layout.num_blocks,
            is_fast=False,
            max_wait_s=MAX_WAIT_S,
            stores_first_use=False,
            rewrite_s=REWRITE_S,
        )
        self.problem: str | None = None
        self.read_s: float | None = None
        self._store = store
        self._checksums = checksums
        # The same memory, by bytes: numpy knows no bfloat16.
        self._rows = cpu.storage.view(torch.uint8).numpy()
        self._tails = TailView(cpu)
        self._wake: Callable[[], None] = lambda: None
        self._ended: deque[TransferEnd] = deque()
        self._loads: queue.SimpleQueue[SlowTransfer | _Stop] = queue.SimpleQueue()
        self._stores: queue.SimpleQueue[SlowTransfer | _Stop] = queue.SimpleQueue()
        self._mutex = threading.Lock()
        self._last_end_s = {True: 0.0, False: 0.0}
        self._threads: list[threading.Thread] = []
        self._is_closing = False
        try:
            store.open()
            self.read_s = store.measure().read_s
        except OSError as error:
            self._note_problem(error)

    @property
    def number(self) -> int:
        """Of its folder among those of the same identity."""
        return self._store.number

    @property
    def num_written_bytes(self) -> int:
        """To its files so far: more than the blocks that were stored have."""
        return self._store.num_written_bytes

    def folder(self) -> Path | None:
        """Where its files are; None as long as the disk cannot be used."""
        return self._store.folder

    def run(self, on_records: Callable[[Records], None], wake: Callable[[], None] = lambda: None) -> None:
        """Start the threads; called once. Returns when all records were told, or after MAX_SCAN_WAIT_S.

        on_records: called in a thread with what lies in the blocks, some at a time, each block once.
        wake: called in a thread when a transfer has ended.
        """
        self._wake = wake
        scan = self._start("disk-scan", lambda: self._scan(on_records))
        scan.join(MAX_SCAN_WAIT_S)
        for _ in range(NUM_LOAD_THREADS):
            self._start("disk-load", lambda: self._work(self._loads, is_load=True))
        self._start("disk-store", lambda: self._work(self._stores, is_load=False))

    def start(self, transfer: SlowTransfer) -> None:
        """Begin a transfer; returns at once."""
        (self._loads if transfer.copy.target_tier == CPU else self._stores).put(transfer)

    def poll(self) -> list[TransferEnd]:
        """The transfers that have ended since the last call."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def close(self) -> None:
        """End the threads after what they do now, and let what was written survive a loss of power. May be called again."""
        self._is_closing = True
        for _ in range(NUM_LOAD_THREADS):
            self._loads.put(_Stop())
        self._stores.put(_Stop())
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            logger.error("a transfer of the disk tier does not end; it is left behind")
            return
        try:
            self._store.sync()
        except OSError as error:
            logger.warning("the disk tier may not survive a loss of power: %s", error)
        self._store.close()

    def _start(self, name: str, work: Callable[[], None]) -> threading.Thread:
        # Daemons, so that one that hangs in the disk does not keep the process.
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _scan(self, on_records: Callable[[Records], None]) -> None:
        start_s, num_chunks = time.monotonic(), 0
        for records in self._store.scan():
            if self._is_closing:
                return
            num_chunks += sum(record is not None for record in records.values())
            on_records(records)
        logger.info(
            "disk tier: %d blocks, %d chunks of an earlier process, read in %.1f s; %s%s",
            self.spec.num_blocks,
            num_chunks,
            time.monotonic() - start_s,
            self._store.folder or "no folder",
            "" if self.read_s is None else f"; a chunk is read in {self.read_s * 1e3:.2f} ms",
        )

    def _work(self, transfers: queue.SimpleQueue[SlowTransfer | _Stop], *, is_load: bool) -> None:
        while True:
            batch: list[SlowTransfer] = []
            transfer = transfers.get()
            while not isinstance(transfer, _Stop):
                batch.append(transfer)
                if len(batch) == MAX_TRANSFERS_AT_ONCE:
                    break
                try:
                    transfer = transfers.get_nowait()
                except queue.Empty:
                    break
            for run in self._runs(batch, is_load=is_load):
                self._carry_out(run, is_load=is_load)
            if batch:
                self._wake()
            if isinstance(transfer, _Stop):
                return

    def _runs(self, batch: Sequence[SlowTransfer], *, is_load: bool) -> list[list[SlowTransfer]]:
        """Those of neighbouring slots of one segment together."""

        def block_of(transfer: SlowTransfer) -> int:
            return transfer.copy.source if is_load else transfer.copy.target

        runs: list[list[SlowTransfer]] = []
        for transfer in sorted(batch, key=block_of):
            block = block_of(transfer)
            if runs and block_of(runs[-1][-1]) == block - 1 and block % self._store.layout.rows_per_segment:
                runs[-1].append(transfer)
            else:
                runs.append([transfer])
        return runs

    def _carry_out(self, run: Sequence[SlowTransfer], *, is_load: bool) -> None:
        start_s = time.perf_counter()
        try:
            results = self._load(run) if is_load else self._store_run(run)
        except Exception as error:
            if not isinstance(error, OSError):
                logger.exception("a transfer of the disk tier failed")
            self._note_problem(error)
            results = [False] * len(run)
        else:
            if any(results) and self.problem is not None:
                logger.info("the disk tier is in use again")
                self.problem = None
        with self._mutex:
            # Of the tier's time: what runs beside another transfer of its kind counts once.
            end_s = time.perf_counter()
            seconds = (end_s - max(start_s, self._last_end_s[is_load])) / len(run)
            self._last_end_s[is_load] = end_s
        for transfer, ok in zip(run, results, strict=True):
            self._ended.append(TransferEnd(transfer.transfer_id, ok, seconds if ok else None))

    def _load(self, run: Sequence[SlowTransfer]) -> list[bool]:
        buffers = [memoryview(self._rows[transfer.copy.target]) for transfer in run]
        results = self._store.read(run[0].copy.source, [transfer.key for transfer in run], buffers)
        if self._checksums is not None:
            for transfer, ok in zip(run, results, strict=True):
                if ok:
                    self._checksums.note_block(transfer.copy.target)
        return results

    def _store_run(self, run: Sequence[SlowTransfer]) -> list[bool]:
        checksums = self._checksums
        if checksums is not None and len(run) > 1:
            return [result for transfer in run for result in self._store_run([transfer])]
        if checksums is not None and not checksums.is_intact(run[0].copy.source):
            return [False]
        buffers = [
            memoryview(self._rows[transfer.copy.source])
            if transfer.record.num_tokens == self._tails.chunk_size
            else self._tails.copy(transfer.copy.source, transfer.record.num_tokens)
            for transfer in run
        ]
        self._store.write(run[0].copy.target, [transfer.record for transfer in run], buffers)
        return [True] * len(run)

    def _note_problem(self, error: Exception) -> None:
        text = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        if self.problem is None:
            logger.warning("the disk tier cannot be used at present, and is tried again: %s", text)
        self.problem = text


def wants_disk_tier(config: EngineConfig) -> bool:
    """Whether the options ask for a disk tier."""
    return config.kv_disk_path is not None and config.mode != "stateless"


def make_rank_tier(config: EngineConfig, local: LocalExecutor, number: int) -> DiskTier | None:
    """This rank's disk tier, if the options ask for one; its folder may be unusable for now.

    number: of this engine among those that share the path.

    Raises ConfigError if its size holds no chunk, or there is no CPU tier; on all ranks of a group or on none.
    """
    if config.kv_disk_path is None or not wants_disk_tier(config):
        return None
    if not local.num_cpu_blocks:
        raise ConfigError(
            "kv_disk_path needs a CPU tier, because KV passes through it; set kv_offloading_size or num_cpu_blocks",
            param="kv_disk_path",
        )
    num_bytes = int(config.kv_disk_size * (1 - TRANSCRIPT_SHARE) * (1 << 30))
    block_bytes = local.bytes_per_cold_block // local.num_ranks
    num_blocks = Layout.blocks_for(num_bytes // local.num_ranks, block_bytes)
    if not num_blocks:
        raise ConfigError(
            f"kv_disk_size is {config.kv_disk_size:g} GiB, but one chunk takes {local.bytes_per_cold_block} bytes; raise it",
            param="kv_disk_size",
        )
    rank = None if local.num_ranks == 1 else local.rank
    layout = Layout(kv_identity(config, local, FORMAT_VERSION), block_bytes, num_blocks, config.chunk_size, rank)
    patience_s = FORMER_WORKER_S if local.rank else 0.0
    store = DiskStore(Path(config.kv_disk_path).expanduser(), layout, number, patience_s)
    return DiskTier(store, local.cpu_store, local.runner.swapper.checksums)
