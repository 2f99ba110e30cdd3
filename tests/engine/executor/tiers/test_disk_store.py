"""The files of the disk tier: whatever happens to them, a read gives what was written under that name, or nothing."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import engine
from engine.core.plan import ChunkRecord
from engine.executor.tiers import disk_store
from engine.executor.tiers.disk_format import PAGE_BYTES, Layout
from engine.executor.tiers.disk_store import DiskStore
from tests.nightly import IS_NIGHTLY

NUM_KILLS = 200 if IS_NIGHTLY else 20
LAYOUT = Layout(identity=b"i" * 16, block_bytes=PAGE_BYTES, num_blocks=6, chunk_size=4)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Of four blocks."""
    monkeypatch.setattr("engine.executor.tiers.disk_format.SEGMENT_BYTES", 8 * PAGE_BYTES)


def key_of(number: int) -> bytes:
    return random.Random(number).randbytes(32)


def content_of(number: int, num_bytes: int = LAYOUT.block_bytes) -> memoryview:
    return in_pages(random.Random(-number - 1).randbytes(num_bytes))


def in_pages(content: bytes) -> memoryview:
    """As O_DIRECT wants it."""
    pages = memoryview(mmap.mmap(-1, len(content)))
    pages[:] = content
    return pages


def record_of(number: int, **changes) -> ChunkRecord:
    values = {
        "key": key_of(number),
        "parent_key": key_of(-number - 1),
        "position": number,
        "num_tokens": 4,
        "owner_id": None,
        "idle_s": 1.0,
    }
    return ChunkRecord(**{**values, **changes})


def make_store(path: Path, layout: Layout = LAYOUT, number: int = 0) -> DiskStore:
    store = DiskStore(path, layout, number)
    store.open()
    return store


def read(store: DiskStore, block: int, key: bytes) -> bytes | None:
    buffer = in_pages(bytes(store.layout.block_bytes))
    try:
        (ok,) = store.read(block, [key], [buffer])
    except OSError:
        return None
    return bytes(buffer) if ok else None


def scan(store: DiskStore) -> dict[int, ChunkRecord]:
    return {block: record for part in store.scan() for block, record in part.items() if record is not None}


def fill(path: Path, layout: Layout = LAYOUT) -> DiskStore:
    store = make_store(path, layout)
    for block in range(layout.num_blocks):
        store.write(block, [record_of(block)], [content_of(block, layout.block_bytes)])
    return store


def check(store: DiskStore) -> int:
    """How much is there; raises if any of it is wrong."""
    found = scan(store)
    num_right = 0
    for block, record in found.items():
        content = read(store, block, record.key)
        if content is not None:
            number = record.position
            assert record.key == key_of(number)
            assert record.parent_key == key_of(-number - 1)
            assert content == content_of(number, store.layout.block_bytes)
            num_right += 1
    return num_right


def test_another_process_finds_what_was_written(tmp_path):
    store = make_store(tmp_path)
    records = [
        record_of(0, owner_id="Zoë's chat \ud800", num_tokens=3),
        record_of(1, owner_id=""),
        record_of(2, idle_s=1000.0),
        record_of(3, owner_id="o" * 5000),
    ]
    store.write(0, records[:2], [content_of(0), content_of(1)])
    store.write(2, records[2:3], [content_of(2)])
    store.write(5, records[3:], [content_of(3)])
    store.sync()
    store.close()
    store = make_store(tmp_path)
    found = scan(store)
    assert {block: record.key for block, record in found.items()} == {
        0: key_of(0),
        1: key_of(1),
        2: key_of(2),
        5: key_of(3),
    }
    assert (found[0].owner_id, found[0].num_tokens) == ("Zoë's chat \ud800", 3)
    assert (found[1].owner_id, found[2].owner_id, found[5].owner_id) == ("", None, None), "too long a name is left out"
    assert 1000 <= found[2].idle_s < 1100
    buffers = [in_pages(bytes(PAGE_BYTES)) for _ in range(3)]
    assert store.read(0, [key_of(0), key_of(7), key_of(2)], buffers) == [True, False, True]
    assert [buffers[0], buffers[2]] == [content_of(0), content_of(2)]
    assert read(store, 4, key_of(0)) is None
    assert read(store, 3, key_of(0)) is None


def test_only_its_user_can_read_the_files(tmp_path):
    path = tmp_path / "deep" / "kv"
    store = fill(path)
    assert store.folder is not None
    for file in path.rglob("*"):
        allowed = 0o700 if file.is_dir() else 0o600
        assert stat.S_IMODE(file.stat().st_mode) == allowed, file


def test_a_folder_that_is_there_and_what_others_have_in_it_stay_as_they_are(tmp_path):
    tmp_path.chmod(0o755)
    theirs = tmp_path / "0123456789abcdef-0"
    theirs.mkdir(mode=0o755)
    (theirs / "file").write_text("theirs")
    fill(tmp_path).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert (theirs / "file").read_text() == "theirs"
    assert [file.name for file in theirs.iterdir()] == ["file"]


@pytest.mark.parametrize("block_bytes", [PAGE_BYTES, 3 * PAGE_BYTES, 5000, 100])
def test_blocks_of_any_size(tmp_path, block_bytes):
    """Those that are no multiple of a page go through the page cache."""
    layout = Layout(identity=b"i" * 16, block_bytes=block_bytes, num_blocks=9, chunk_size=4)
    store = fill(tmp_path, layout)
    assert store.is_direct <= (block_bytes % PAGE_BYTES == 0)
    store.close()
    assert check(make_store(tmp_path, layout)) == 9
    assert min(store.measure(3)) > 0


def test_any_flipped_byte_of_a_row_is_a_miss(tmp_path):
    store = fill(tmp_path)
    file = store.folder / "00000000.kv"
    whole = file.read_bytes()
    length = len(whole[:PAGE_BYTES].rstrip(b"\0"))
    assert length > 100
    for place in range(length):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        file.write_bytes(damaged)
        assert check(store) == 5, place
    file.write_bytes(whole)
    assert check(store) == 6


def test_any_flipped_bit_of_a_slot_is_a_miss(tmp_path):
    store = fill(tmp_path)
    file = store.folder / "00000000.kv"
    whole = file.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(4 * PAGE_BYTES, 8 * PAGE_BYTES)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        assert check(store) == 5


def test_pages_in_each_others_places_are_misses(tmp_path):
    store = fill(tmp_path)
    files = [store.folder / f"{number:08d}.kv" for number in range(2)]
    whole = [file.read_bytes() for file in files]
    pages = [[content[i : i + PAGE_BYTES] for i in range(0, len(content), PAGE_BYTES)] for content in whole]
    for i in range(8):
        for j in range(i):
            swapped = pages[0][:]
            swapped[i], swapped[j] = swapped[j], swapped[i]
            files[0].write_bytes(b"".join(swapped))
            assert check(store) <= 5
    files[0].write_bytes(whole[1])
    files[1].write_bytes(whole[0])
    assert check(store) == 0


def test_a_file_that_is_cut_anywhere(tmp_path):
    store = fill(tmp_path)
    file = store.folder / "00000000.kv"
    whole = file.read_bytes()
    for length in range(0, len(whole) + 1, 512):
        file.write_bytes(whole[:length])
        assert check(store) == 2 + sum(length >= (4 + row + 1) * PAGE_BYTES for row in range(4))
    file.write_bytes(whole[: 5 * PAGE_BYTES])
    store.close()
    store = make_store(tmp_path)
    store.write(3, [record_of(3)], [content_of(3)])
    assert check(store) == 4, "it has its full size again"


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"no segment at all" * 4000], ids=len)
def test_a_file_that_is_none_of_ours(tmp_path, content):
    store = make_store(tmp_path)
    (store.folder / "00000000.kv").write_bytes(content)
    (store.folder / "00000009.kv").write_bytes(content)
    (store.folder / "notes.kv").write_bytes(content)
    store.close()
    store = make_store(tmp_path)
    assert check(store) == 0
    assert {file.name for file in store.folder.glob("*.kv")} == {"00000000.kv"}, "those beyond the size are gone"
    store.write(0, [record_of(0)], [content_of(0)])
    assert check(store) == 1


@pytest.mark.parametrize(
    "changes", [{"identity": b"j" * 16}, {"block_bytes": 2 * PAGE_BYTES}, {"num_blocks": 4}, {"chunk_size": 3}]
)
def test_files_of_another_layout(tmp_path, changes):
    fill(tmp_path).close()
    values = {name: getattr(LAYOUT, name) for name in ("identity", "block_bytes", "num_blocks", "chunk_size")}
    layout = Layout(**{**values, **changes})
    store = make_store(tmp_path, layout)
    assert check(store) == (4 if "num_blocks" in changes else 0)
    assert len(list(tmp_path.iterdir())) == 1, "what another model has left under this number is removed"


def test_each_process_has_a_folder(tmp_path):
    first, second = fill(tmp_path), make_store(tmp_path)
    other = make_store(tmp_path, Layout(identity=b"j" * 16, block_bytes=100, num_blocks=4, chunk_size=4))
    third = make_store(tmp_path, number=7)
    assert [int(store.folder.name.split("-")[1]) for store in (first, second, other, third)] == [0, 1, 0, 7]
    assert check(second) == 0
    first.close()
    assert check(make_store(tmp_path)) == 6


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    store = fill(tmp_path / "kv")
    shutil.rmtree(tmp_path / "kv")
    assert read(store, 0, key_of(0)) is None
    assert scan(store) == {}
    store.write(0, [record_of(0)], [content_of(0)])
    assert check(store) == 1


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, monkeypatch):
    store = make_store(tmp_path)
    store.write(0, [record_of(0)], [content_of(0)])
    with monkeypatch.context() as patch:
        patch.setattr(disk_store, "MIN_FREE_BYTES", 1 << 62)
        patch.setattr(disk_store, "MIN_FREE_SHARE", 1.0)
        store.write(1, [record_of(1)], [content_of(1)])
        with pytest.raises(OSError, match="would stay free") as caught:
            store.write(4, [record_of(4)], [content_of(4)])
        assert caught.value.errno == errno.ENOSPC
    pwritev = os.pwritev
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", lambda descriptor, buffers, offset: pwritev(descriptor, buffers[:1], offset))
        with pytest.raises(OSError, match="a part"):
            store.write(2, [record_of(2), record_of(3)], [content_of(2), content_of(3)])
    assert check(store) == 2
    store.write(2, [record_of(2), record_of(3)], [content_of(2), content_of(3)])
    assert check(store) == 4


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EMFILE])
def test_a_disk_that_fails_under_way(tmp_path, monkeypatch, code):
    """At any of its calls; what was there before is right afterwards, or missing."""
    calls = {name: getattr(os, name) for name in ("open", "pwritev", "posix_fallocate", "fstatvfs", "preadv")}
    for number, name in enumerate(calls):
        path = tmp_path / name
        store = fill(path)
        store._sized.clear()

        def fail(*_, **__):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            if name == "posix_fallocate":
                (store.folder / "00000000.kv").write_bytes(b"")
            if name == "preadv":
                assert check(store) == 0
            elif name != "fstatvfs":
                with pytest.raises(OSError, match=os.strerror(code)):
                    store.write(2, [record_of(number + 10)], [content_of(number + 10)])
        store.write(2, [record_of(number + 10)], [content_of(number + 10)])
        assert check(store) >= 3


KILLED = """
import os, random, signal, sys
from pathlib import Path
from tests.engine.executor.tiers import test_disk_store as tests
from engine.executor.tiers import disk_format
disk_format.SEGMENT_BYTES = 8 * disk_format.PAGE_BYTES
path, num_kills = Path(sys.argv[1]), int(sys.argv[2])
num_right = num_torn = 0
pwritev = os.pwritev
for kill in range(num_kills):
    rng = random.Random(kill)
    child = os.fork()
    if not child:
        left = rng.randrange(1, 40)
        def killing(descriptor, buffers, offset):
            global left
            left -= 1
            if left:
                return pwritev(descriptor, buffers, offset)
            whole = b"".join(buffers)  # some pages of it reach the file, in any order
            for place in rng.sample(range(0, len(whole), 4096), rng.randint(0, len(whole) // 4096)):
                pwritev(descriptor, [tests.in_pages(whole[place : place + 4096])], offset + place)
            os.kill(os.getpid(), signal.SIGKILL)
        store = tests.make_store(path)
        os.pwritev = killing
        while True:
            block = rng.randrange(tests.LAYOUT.num_blocks)
            most = min(3, tests.LAYOUT.num_blocks - block, 4 - block % 4)
            numbers = [rng.randrange(1000) for _ in range(rng.randint(1, most))]
            store.write(block, [tests.record_of(n) for n in numbers], [tests.content_of(n) for n in numbers])
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    store = tests.make_store(path)
    num_found = len(tests.scan(store))
    right = tests.check(store)
    num_right, num_torn = num_right + right, num_torn + num_found - right
    store.close()
print(num_right, num_torn)
"""


def test_a_process_that_is_killed_between_writing_and_publishing(tmp_path):
    """At a random call, of which a random part is done: never wrong, and the next process starts."""
    root = str(Path(engine.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "kv"), str(NUM_KILLS)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    num_right, num_torn = map(int, ended.stdout.split())
    assert num_right >= 3 * NUM_KILLS
    assert num_torn >= NUM_KILLS // 5, "the gap between slot and row was hit"


def test_a_part_that_is_given_back_soon_is_waited_for(tmp_path):
    former = DiskStore(tmp_path, LAYOUT)
    former.open()
    impatient, patient = DiskStore(tmp_path, LAYOUT), DiskStore(tmp_path, LAYOUT, patience_s=60.0)
    impatient.open()
    assert impatient.number == 1
    threading.Timer(0.1, former.close).start()
    patient.open()
    assert patient.number == 0
    for store in (impatient, patient):
        store.close()


def test_ranks_have_files_of_their_own_which_another_identity_replaces(tmp_path):
    """All those of a number, but for those that a process has."""
    ranks = [DiskStore(tmp_path, replace(LAYOUT, rank=rank)) for rank in range(3)]
    for store in ranks:
        store.open()
        store.write(0, [record_of(0)], [content_of(0)])
    assert [store.number for store in ranks] == [0, 0, 0]
    for store in ranks[:2]:
        store.close()
    other = DiskStore(tmp_path, replace(LAYOUT, identity=b"j" * 16))
    other.open()
    kept = {ranks[2].folder.name, other.folder.name}
    assert {folder.name for folder in tmp_path.iterdir()} == kept
    for store in (ranks[2], other):
        store.close()


def test_no_rank_takes_the_files_of_another_one_for_its_own(tmp_path):
    store = DiskStore(tmp_path, replace(LAYOUT, rank=0))
    store.write(0, [record_of(0)], [content_of(0)])
    folder = store.folder
    store.close()
    for rank, is_found in ((0, True), (1, False), (None, False)):
        folder = folder.rename(tmp_path / f"{LAYOUT.identity.hex()[:16]}-0{'' if rank is None else f'-rank{rank}'}")
        store = DiskStore(tmp_path, replace(LAYOUT, rank=rank))
        store.open()
        found = {block: record for records in store.scan() for block, record in records.items()}
        assert (found[0] is not None) == is_found
        store.close()
