"""The memory behind the block ids."""

import pytest
import torch

from engine.attention.metadata import LayerShape
from engine.core.plan import BlockCopy
from engine.errors import ConfigError
from engine.executor.kv_store import KVStore, block_bytes


def test_copies_read_every_source_before_any_target_is_written():
    layers = [LayerShape(1, 2, 3)]
    store = KVStore(layers, num_blocks=4, chunk_size=2, dtype=torch.float32, device=torch.device("cpu"))
    store.storage[:] = torch.arange(4.0)[:, None]
    store.copy_blocks([BlockCopy(0, 1), BlockCopy(1, 2), BlockCopy(2, 0), BlockCopy(3, 3)])
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


class FakeCudart:
    """Notes what is pinned; refuses more than a kilobyte."""

    def __init__(self) -> None:
        self.pinned: dict[int, tuple[int, int]] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if num_bytes > 1024:
            return 2
        self.pinned[address] = (num_bytes, flags)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_pinned_memory_is_exactly_that_of_the_blocks_and_is_given_back(monkeypatch):
    cudart = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    sizes = {"chunk_size": 2, "dtype": torch.float32, "device": torch.device("cpu"), "pin_memory": True}
    layers = (LayerShape(1, 3, 3),)
    store = KVStore(layers, num_blocks=5, **sizes)
    assert cudart.pinned == {store.storage.data_ptr(): (5 * 2 * 6 * 4, 3)}
    store.unpin()
    store.unpin()
    assert cudart.pinned == {}
    with pytest.raises(ConfigError, match=r"cannot be pinned.*lower kv_offloading_size"):
        KVStore(layers, num_blocks=30, **sizes)
    KVStore(layers, num_blocks=0, **sizes).unpin()


@pytest.mark.parametrize("num_blocks", [1 << 44, 1 << 60])
def test_more_host_memory_than_there_is_is_an_error_of_the_configuration(num_blocks):
    with pytest.raises(ConfigError, match="of host memory cannot be had"):
        KVStore(
            [LayerShape(1, 3, 3)], num_blocks=num_blocks, chunk_size=2, dtype=torch.float32, device=torch.device("cpu")
        )
