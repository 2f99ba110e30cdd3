"""Chunks are found by content, by all who may know that content, and by no others."""

import itertools

from engine.core.cache.index import Chunk, ChunkIndex, chunk_key, full_chunk_keys, root_key

ROOT = root_key("model", "", "acme")


def named(index: ChunkIndex, position: int, parent: bytes, token_ids: tuple[int, ...]) -> Chunk:
    chunk = Chunk(position, [0, None])
    chunk.num_tokens = len(token_ids)
    assert index.insert(chunk, chunk_key(parent, token_ids), parent)
    return chunk


def test_a_root_differs_by_model_adapter_and_tenant_however_they_are_cut():
    parts = ["", "a", "b", "ab", "ba", "aab"]
    roots = {root_key(*names) for names in itertools.product(parts, repeat=3)}
    assert len(roots) == len(parts) ** 3


def test_a_key_tells_everything_up_to_its_end():
    keys = {
        chunk_key(ROOT, (1, 2, 3, 4)),
        chunk_key(ROOT, (1, 2, 3)),
        chunk_key(ROOT, (1, 2, 4, 3)),
        chunk_key(root_key("model", "", "umbrella"), (1, 2, 3, 4)),
        chunk_key(chunk_key(ROOT, (1, 2, 3, 4)), (1, 2, 3, 4)),
        chunk_key(chunk_key(ROOT, (9, 2, 3, 4)), (1, 2, 3, 4)),
        chunk_key(ROOT, (1, 2 + (3 << 8))),
        chunk_key(ROOT, (0x04030201,)),
        ROOT,
    }
    assert len(keys) == 9
    assert chunk_key(ROOT, [1, 2, 3, 4]) == chunk_key(ROOT, (1, 2, 3, 4))


def test_the_keys_of_a_row_of_chunks_are_those_of_each():
    token_ids = list(range(11))
    first = chunk_key(ROOT, token_ids[:4])
    assert full_chunk_keys(ROOT, token_ids, 4) == [first, chunk_key(first, token_ids[4:8])]
    assert full_chunk_keys(first, token_ids[4:8], 4) == [chunk_key(first, token_ids[4:8])]
    assert full_chunk_keys(ROOT, token_ids[:3], 4) == []


def test_the_longest_tail_that_the_context_continues_is_found():
    index = ChunkIndex(4)
    one, three = named(index, 0, ROOT, (1,)), named(index, 0, ROOT, (1, 2, 3))
    other_two = named(index, 0, ROOT, (1, 9))
    assert index.match_tail(ROOT, (1, 2, 3, 4)) is three
    assert index.match_tail(ROOT, (1, 2, 3)) is three
    assert index.match_tail(ROOT, (1, 2)) is one
    assert index.match_tail(ROOT, (1, 9, 9, 9)) is other_two
    assert index.match_tail(ROOT, (2, 1)) is None
    assert index.match_tail(ROOT, ()) is None
    index.remove(three)
    assert index.match_tail(ROOT, (1, 2, 3, 4)) is one


def test_a_tail_is_found_under_its_own_parent_only():
    index = ChunkIndex(4)
    parent = chunk_key(ROOT, (1, 2, 3, 4))
    tail = named(index, 1, parent, (5,))
    assert index.match_tail(parent, (5, 6)) is tail
    assert index.match_tail(ROOT, (5, 6)) is None
    assert index.match_tail(chunk_key(root_key("model", "", "umbrella"), (1, 2, 3, 4)), (5, 6)) is None


def test_a_full_chunk_is_no_tail():
    index = ChunkIndex(4)
    full = named(index, 0, ROOT, (1, 2, 3, 4))
    assert index.match_tail(ROOT, (1, 2, 3, 4)) is None
    assert index.match(full.key) is full


def test_a_name_is_given_once():
    index = ChunkIndex(4)
    first = named(index, 0, ROOT, (1, 2))
    second = Chunk(0, [1, None])
    second.num_tokens = 2
    assert not index.insert(second, chunk_key(ROOT, (1, 2)), ROOT)
    assert second.key is None
    assert list(index) == [first]
    index.remove(first)
    assert first.key is None
    assert index.insert(second, chunk_key(ROOT, (1, 2)), ROOT)
    assert index.match_tail(ROOT, (1, 2)) is second


def test_nothing_is_left_of_tails_that_are_gone():
    index = ChunkIndex(4)
    for chunk in [named(index, 0, ROOT, (1,)), named(index, 0, ROOT, (2,)), named(index, 0, ROOT, (1, 2))]:
        index.remove(chunk)
    assert len(index) == 0
    assert index._tail_lengths == {}, "the lengths of tails that are gone are counted for ever"


def test_more_blocks_are_to_remember_more_dropped_chunks_within_bounds():
    limits = [ChunkIndex(4, num_blocks).max_dropped for num_blocks in (0, 8_000, 10_000, 1_000_000)]
    assert limits == [1 << 14, 1 << 14, 20_000, 1 << 17]
