"""The memory behind the block ids."""

import ctypes
import gc
import itertools
import mmap
from pathlib import Path

import pytest
import torch

from engine.attention.protocol import LayerShape
from engine.errors import ConfigError
from engine.executor.tiers import host_pages
from engine.executor.tiers.kv_store import KVStore, block_bytes
from tests.copies import local_copy


def test_copies_read_every_source_before_any_target_is_written():
    layers = [LayerShape(1, 2, 3)]
    store = KVStore(layers, num_blocks=4, chunk_size=2, dtype=torch.float32, device=torch.device("cpu"))
    store.storage[:] = torch.arange(4.0)[:, None]
    store.copy_blocks([local_copy(0, 1), local_copy(1, 2), local_copy(2, 0), local_copy(3, 3)])
    assert store.storage[:, 0].tolist() == [2.0, 0.0, 1.0, 3.0]


def test_pools_are_views_of_one_run_of_memory_per_block():
    layers = [LayerShape(2, 4, 4), LayerShape(1, 6, 3)]
    store = KVStore(layers, num_blocks=3, chunk_size=5, dtype=torch.float16, device=torch.device("cpu"))
    store.storage.zero_()
    for k_pool, v_pool in store.layer_pools:
        k_pool[1].fill_(1)
        v_pool[1].fill_(1)
    assert store.storage[1].all(), "the pools cover the block"
    assert not store.storage[0].any()
    assert not store.storage[2].any()
    assert store.storage[0].nbytes == block_bytes(layers, 5, torch.float16) == 2 * 5 * (2 * 8 + 9)
    assert [tuple(pool.shape) for pools in store.layer_pools for pool in pools] == [
        (3, 2, 5, 4),
        (3, 2, 5, 4),
        (3, 1, 5, 6),
        (3, 1, 5, 3),
    ]


def are_resident(address: int, num_bytes: int) -> bool:
    """Whether the system has given all pages of a range; raises if a part of it is not mapped."""
    libc = ctypes.CDLL(None, use_errno=True)
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    pages = (ctypes.c_ubyte * (-(-(address + num_bytes - start) // mmap.PAGESIZE)))()
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(address + num_bytes - start), pages):
        raise OSError(ctypes.get_errno(), "not mapped")
    return all(page & 1 for page in pages)


class FakeCudart:
    """CUDA's registrations: of pages that are there, none of them twice, and undone while they still are."""

    def __init__(self, limit: int = 1 << 40) -> None:
        """limit: bytes that can be registered."""
        self.pinned: dict[int, tuple[int, int]] = {}
        self._limit = limit

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for num_bytes, _ in self.pinned.values())

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert are_resident(address, num_bytes), "pages that are not there yet take three times as long"
        pages = {page for start, (size, _) in self.pinned.items() for page in self._pages(start, size)}
        if pages & set(self._pages(address, num_bytes)):
            return 712
        if self.num_bytes + num_bytes > self._limit:
            return 2
        self.pinned[address] = (num_bytes, flags)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        are_resident(address, self.pinned[address][0])  # raises if they are gone
        del self.pinned[address]
        return 0

    @staticmethod
    def _pages(address: int, num_bytes: int) -> range:
        return range(address // mmap.PAGESIZE, -(-(address + num_bytes) // mmap.PAGESIZE))


@pytest.fixture
def cudart(monkeypatch) -> FakeCudart:
    cudart = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    return cudart


PINNED = {"chunk_size": 2, "dtype": torch.float32, "device": torch.device("cpu"), "pin_memory": True}
SMALL = (LayerShape(1, 3, 3),)
LARGE = (LayerShape(3, 128, 128),)  # blocks of 6 KiB: every second one ends within a page


def test_pinned_memory_is_exactly_that_of_the_blocks_and_is_given_back(cudart):
    store = KVStore(SMALL, num_blocks=5, **PINNED)
    assert cudart.pinned == {store.storage.data_ptr(): (5 * 2 * 6 * 4, 3)}
    assert store.storage.data_ptr() % mmap.PAGESIZE == 0
    store.unpin()
    store.unpin()
    assert cudart.pinned == {}
    KVStore(SMALL, num_blocks=0, **PINNED).unpin()


def test_stores_share_no_page(cudart):
    stores = [KVStore(SMALL, num_blocks=1, **PINNED) for _ in range(8)]
    assert len(cudart.pinned) == 8
    del stores
    assert cudart.pinned == {}


def test_a_store_that_is_dropped_unregisters_its_pages_before_they_are_given_back(cudart):
    """Else the next allocation at that address is registered already, or copies go to pages that are no longer ours."""
    store = KVStore(LARGE, num_blocks=4, **PINNED)
    pool = store.layer_pools[0][1]
    del store
    assert len(cudart.pinned) == 1, "a view of it is in use"
    del pool
    assert cudart.pinned == {}


def test_an_error_after_the_store_was_made_unregisters_its_pages(cudart):
    def make() -> None:
        store = KVStore(LARGE, num_blocks=4, **PINNED)
        raise RuntimeError(f"no memory for graphs beside {store.num_blocks} blocks")

    with pytest.raises(RuntimeError):
        make()
    gc.collect()
    assert cudart.pinned == {}


def test_large_stores_are_registered_in_pieces_that_end_between_blocks_and_between_pages(cudart, monkeypatch):
    monkeypatch.setattr(host_pages, "MAX_PIECE_BYTES", 40_000)
    store = KVStore(LARGE, num_blocks=17, **PINNED)
    block = store.storage[0].nbytes
    assert block % mmap.PAGESIZE
    sizes = [num_bytes for num_bytes, _ in cudart.pinned.values()]
    assert sizes == [6 * block, 6 * block, 5 * block]
    assert list(itertools.accumulate(sizes, initial=store.storage.data_ptr()))[:-1] == list(cudart.pinned)
    assert 6 * block % mmap.PAGESIZE == 0
    store.unpin()
    assert cudart.pinned == {}


def test_a_registration_that_fails_undoes_those_before_it_and_ends_the_process(monkeypatch):
    cudart = FakeCudart(limit=90_000)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(host_pages, "MAX_PIECE_BYTES", 40_000)
    with pytest.raises(ConfigError, match=r"cannot be pinned.*error 2.*lower kv_offloading_size.*restart the process"):
        KVStore(LARGE, num_blocks=17, **PINNED)
    assert cudart.pinned == {}


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages")
def test_pinned_pages_may_be_huge_ones(cudart):
    """They take the driver a fraction of the time."""
    store = KVStore(LARGE, num_blocks=4, **PINNED)
    areas = Path("/proc/self/smaps").read_text().split("VmFlags:")
    address = f"{store.storage.data_ptr():x}-"
    flags = [after.splitlines()[0].split() for area, after in itertools.pairwise(areas) if f"\n{address}" in area]
    assert len(flags) == 1
    assert "hg" in flags[0]


@pytest.mark.parametrize("num_blocks", [1 << 44, 1 << 60])
def test_more_host_memory_than_there_is_is_an_error_of_the_configuration(num_blocks):
    with pytest.raises(ConfigError, match="of host memory cannot be allocated"):
        KVStore(
            [LayerShape(1, 3, 3)], num_blocks=num_blocks, chunk_size=2, dtype=torch.float32, device=torch.device("cpu")
        )
