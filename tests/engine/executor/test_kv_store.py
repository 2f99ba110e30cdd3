"""The memory behind the block ids."""

import torch

from engine.attention.metadata import LayerShape
from engine.core.plan import BlockCopy
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
