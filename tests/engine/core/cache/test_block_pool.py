"""Block ids: each is free or taken, never both."""

import pytest

from engine.core.cache.block_pool import BlockPool


def test_ids_are_handed_out_in_order_and_the_one_freed_last_comes_first():
    pool = BlockPool("gpu", 3)
    assert [pool.try_allocate() for _ in range(4)] == [0, 1, 2, None]
    pool.free(1)
    pool.free(0)
    assert (pool.num_free, pool.num_used) == (2, 1)
    assert [pool.try_allocate() for _ in range(3)] == [0, 1, None]


def test_freeing_twice_is_caught():
    pool = BlockPool("gpu", 2)
    block_id = pool.try_allocate()
    pool.free(block_id)
    with pytest.raises(AssertionError, match="gpu block 0 freed twice"):
        pool.free(block_id)


@pytest.mark.parametrize(
    ("owned", "complaint"),
    [([0], r"2 free \+ 1 owned != 4"), ([0, 1, 1], "two owners"), ([0, 2], "both free and owned")],
)
def test_integrity_check_finds_lost_shared_and_doubly_used_blocks(owned, complaint):
    pool = BlockPool("cpu", 4)
    taken = [pool.try_allocate(), pool.try_allocate()]
    pool.check_integrity(taken)
    with pytest.raises(AssertionError, match=complaint):
        pool.check_integrity(owned)
