"""The files of a disk tier: writes blocks to slots, reads them back, finds at a start what an earlier process has left.

Blocking; every call may come from any thread. Decides nothing: which block goes where is told. Whatever the disk does, a read
gives what was written under that name, or nothing.

    <path>/<identity>-<number>/lock           held as long as the process lives
                               00000000.kv    segments, see disk_format

The ranks of a tensor-parallel group have a folder each, <identity>-<number>-rank<rank>.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import re
import shutil
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from engine.core.plan import ChunkRecord
from engine.executor.tiers.disk_format import PAGE_BYTES, Layout, Row, pack_row, slot_checksum, unpack_row
from engine.paths import private_folder

logger = logging.getLogger(__name__)

MAX_FOLDERS = 256
FOLDER_NAME = re.compile(r"(?P<identity>[0-9a-f]{16})-(?P<number>[0-9]+)(-rank[0-9]+)?")
# A file system is not filled beyond that, the smaller one of both: others need it, too.
MIN_FREE_BYTES = 1 << 30
MIN_FREE_SHARE = 0.05
NUM_PROBED_SLOTS = 8
# How often it is looked whether a folder is free, in seconds.
LOCK_INTERVAL_S = 0.05


class DiskSpeed(NamedTuple):
    """Seconds to read a slot, and to write one so that it survives a loss of power."""

    read_s: float
    write_s: float


class DiskStore:
    """The slots of one process.

    folder: its files; None as long as there is none, because the disk could not be used so far.
    number: of the folder among those of the same identity; as long as there is none, the one that was asked for.
    num_written_bytes: to the segments so far, rows and what fills slots up included.
    """

    def __init__(self, path: Path, layout: Layout, number: int = 0, patience_s: float = 0.0) -> None:
        """Takes no file yet; see `open`.

        path: the folder that was asked for, of which each process has a part.
        number: of the part, if no other process has it; one that is restarted finds its files if it asks for the same.
        patience_s: how long `open` waits for another process to give that part back, before it takes another one.
        """
        self.layout = layout
        self.folder: Path | None = None
        self.is_direct = False
        self.num_written_bytes = 0
        self._path = path
        self.number = number
        self._patience_s = patience_s
        self._lock: int | None = None
        self._checksums = array("I", bytes(4 * layout.num_blocks))
        self._sized: set[int] = set()  # the segments that have their full size
        self._unsynced: set[int] = set()
        self._mutex = threading.Lock()  # of the sets, and of taking a folder

    # -- the folder ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take a folder, unless there is one that is still there. Raises OSError."""
        with self._mutex:
            if self.folder is not None and self.folder.exists():
                return
            self._close_lock()
            self._sized.clear()
            if not self._path.exists():
                private_folder(self._path)  # one that exists may be for others, too, and stays as it is
            deadline = time.monotonic() + self._patience_s
            identity, rank = self.layout.identity.hex()[:16], self.layout.rank
            for number in dict.fromkeys((self.number, *range(MAX_FOLDERS))):
                name = f"{identity}-{number}" + ("" if rank is None else f"-rank{rank}")
                folder = private_folder(self._path / name)
                self._lock = _try_lock(folder)
                while self._lock is None and number == self.number and time.monotonic() < deadline:
                    time.sleep(LOCK_INTERVAL_S)
                    self._lock = _try_lock(folder)
                if self._lock is not None:
                    break
            else:
                raise OSError(errno.EBUSY, f"{MAX_FOLDERS} processes use {self._path}; name another folder")
            self.folder, self.number = folder, number
            _remove_others(self._path, identity, number)
            for file in folder.glob("*.kv"):
                if not file.stem.isdigit() or int(file.stem) >= self.layout.num_segments:
                    file.unlink()
            self.is_direct = self.layout.block_bytes % PAGE_BYTES == 0 and _can_be_direct(folder)

    def close(self) -> None:
        """Let another process have the folder."""
        with self._mutex:
            self._close_lock()

    def _close_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = self.folder = None

    @contextmanager
    def _opened(self, segment: int, flags: int) -> Iterator[int]:
        if self.folder is None:
            raise OSError(errno.ENOENT, f"{self._path} could not be used so far")
        direct = os.O_DIRECT if self.is_direct else 0
        descriptor = os.open(self.folder / f"{segment:08d}.kv", flags | direct | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    # -- what an earlier process has left ------------------------------------------------------------------------------

    def scan(self) -> Iterator[dict[int, ChunkRecord | None]]:
        """What lies in each block, segment by segment; reads rows only, and trusts nothing about slots.

        None = nothing that can be used. A file that cannot be read has nothing.
        """
        layout = self.layout
        for segment in reversed(range(layout.num_segments)):  # the last block that is told is the first to be used
            first = segment * layout.rows_per_segment
            blocks = range(first, min(first + layout.rows_per_segment, layout.num_blocks))
            pages = self._read_rows(segment)
            records: dict[int, ChunkRecord | None] = {}
            now = time.time()
            for index, block in reversed(list(enumerate(blocks))):
                row = unpack_row(layout, block, pages[index * PAGE_BYTES : (index + 1) * PAGE_BYTES], now)
                records[block] = None if row is None else row.record
                if row is not None:
                    self._checksums[block] = row.checksum
            yield records

    def _read_rows(self, segment: int) -> memoryview:
        try:
            with self._opened(segment, os.O_RDONLY) as descriptor:
                pages = memoryview(mmap.mmap(-1, self.layout.rows_per_segment * PAGE_BYTES))
                num_read = os.preadv(descriptor, [pages], 0)
                return pages[:num_read]
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("segment %d of the disk tier cannot be read: %s", segment, error)
        return memoryview(b"")

    # -- blocks --------------------------------------------------------------------------------------------------------

    def read(self, block: int, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> list[bool]:
        """Read the slots from `block` on, which are of one segment, into the buffers.

        Returns which of them hold what was written under these keys. Raises OSError.
        """
        segment, row = divmod(block, self.layout.rows_per_segment)
        with self._opened(segment, os.O_RDONLY) as descriptor:
            num_read = os.preadv(descriptor, self._slots(buffers), self.layout.slot_offset(row))
            self._drop_from_page_cache(descriptor, self.layout.slot_offset(row), num_read)
        results = []
        for index, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            is_whole = num_read >= index * self.layout.slot_bytes + self.layout.block_bytes
            results.append(is_whole and slot_checksum(key, buffer) == self._checksums[block + index])
        return results

    def write(self, block: int, records: Sequence[ChunkRecord], buffers: Sequence[memoryview]) -> None:
        """Write the slots from `block` on, which are of one segment, then their rows. Raises OSError."""
        layout = self.layout
        self.open()
        segment, first_row = divmod(block, layout.rows_per_segment)
        now = time.time()
        pages = memoryview(mmap.mmap(-1, len(records) * PAGE_BYTES))
        for index, (record, buffer) in enumerate(zip(records, buffers, strict=True)):
            checksum = slot_checksum(record.key, buffer)
            row = pack_row(layout, block + index, Row(record, now - record.idle_s, checksum))
            pages[index * PAGE_BYTES : (index + 1) * PAGE_BYTES] = row
            self._checksums[block + index] = checksum
        with self._opened(segment, os.O_RDWR | os.O_CREAT) as descriptor:
            self._allocate(segment, descriptor)
            _write_all(descriptor, self._slots(buffers), layout.slot_offset(first_row))
            _write_all(descriptor, [pages], layout.row_offset(first_row))
            if not self.is_direct:
                os.fdatasync(descriptor)  # else the page cache is a second CPU tier that is not accounted for
                self._drop_from_page_cache(descriptor, layout.slot_offset(first_row), len(buffers) * layout.slot_bytes)
        with self._mutex:
            self._unsynced.add(segment)
            self.num_written_bytes += len(records) * (layout.slot_bytes + PAGE_BYTES)

    def sync(self) -> None:
        """Let all that was written survive a loss of power. Raises OSError."""
        with self._mutex:
            segments, self._unsynced = self._unsynced, set()
        for segment in segments:
            with self._opened(segment, os.O_RDWR) as descriptor:
                os.fsync(descriptor)

    def measure(self, num_slots: int = NUM_PROBED_SLOTS) -> DiskSpeed:
        """Write and read so many slots of a file that is removed again. Raises OSError."""
        self.open()
        assert self.folder is not None
        size = self.layout.slot_bytes
        buffers = [memoryview(mmap.mmap(-1, size)) for _ in range(num_slots)]
        file = self.folder / "probe"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_DIRECT if self.is_direct else 0)
        descriptor = os.open(file, flags, 0o600)
        try:
            start_s = time.perf_counter()
            _write_all(descriptor, buffers, 0)
            os.fsync(descriptor)
            write_s = time.perf_counter() - start_s
            self._drop_from_page_cache(descriptor, 0, size * num_slots)
            start_s = time.perf_counter()
            os.preadv(descriptor, buffers, 0)
            return DiskSpeed((time.perf_counter() - start_s) / num_slots, write_s / num_slots)
        finally:
            os.close(descriptor)
            file.unlink()

    def _slots(self, buffers: Sequence[memoryview]) -> list[memoryview]:
        """The buffers, with what fills each up to a slot behind it."""
        num_filled = self.layout.slot_bytes - self.layout.block_bytes
        if not num_filled:
            return list(buffers)
        return [part for buffer in buffers for part in (buffer, memoryview(bytearray(num_filled)))]

    def _allocate(self, segment: int, descriptor: int) -> None:
        """Give a segment all of its space before it is used, so that a full disk says so now. Raises OSError."""
        with self._mutex:
            if segment in self._sized:
                return
        missing = self.layout.segment_bytes - os.fstat(descriptor).st_size
        if missing > 0:
            system = os.fstatvfs(descriptor)
            least = min(MIN_FREE_BYTES, int(MIN_FREE_SHARE * system.f_blocks * system.f_frsize))
            if system.f_bavail * system.f_frsize - missing < least:
                raise OSError(errno.ENOSPC, f"less than {least >> 20} MiB would stay free in {self._path}")
            os.posix_fallocate(descriptor, 0, self.layout.segment_bytes)
        with self._mutex:
            self._sized.add(segment)

    def _drop_from_page_cache(self, descriptor: int, offset: int, num_bytes: int) -> None:
        if not self.is_direct:
            os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _write_all(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    num_bytes = sum(len(buffer) for buffer in buffers)
    if os.pwritev(descriptor, buffers, offset) != num_bytes:
        raise OSError(errno.ENOSPC, "the disk took a part of what was written")


def _try_lock(folder: Path) -> int | None:
    """The descriptor that holds the lock of a folder; None if another process has it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_others(path: Path, identity: str, number: int) -> None:
    """Remove what another identity has left under that number, whatever its rank, unless a process uses it."""
    for folder in path.iterdir():
        name = FOLDER_NAME.fullmatch(folder.name)
        if name is None or name["identity"] == identity or int(name["number"]) != number:
            continue
        if (folder / "lock").is_file():
            with suppress(OSError):
                lock = _try_lock(folder)
                if lock is not None:
                    logger.info("removing %s: it is of another model, dtype or version", folder)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)


def _can_be_direct(folder: Path) -> bool:
    """Whether the file system lets files be read and written past the page cache."""
    page = memoryview(mmap.mmap(-1, PAGE_BYTES))
    file = folder / "probe"
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600)
        try:
            return os.pwritev(descriptor, [page], 0) == os.preadv(descriptor, [page], 0) == PAGE_BYTES
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            return True  # it is full, say, but what lies there can be read
        logger.info("the disk tier goes through the page cache, because %s does not allow O_DIRECT", folder)
        return False
    finally:
        with suppress(OSError):
            file.unlink()
