"""The work lists of the Triton kernel: every row of every segment once, every key of its context once, the largest first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.attention.tiling import MAX_SPLITS, SPLIT_STEP, tile_decode_batch, tile_segments

segments_strategy = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20_000)), min_size=1, max_size=8)


def descriptors(lengths: list[tuple[int, int]]) -> np.ndarray:
    """Of [(query_len, tokens before them)]."""
    query_lens = np.array([query_len for query_len, _ in lengths])
    context_lens = query_lens + [before for _, before in lengths]
    rows = query_lens.cumsum() - query_lens
    return np.stack([rows, query_lens, context_lens, np.arange(len(lengths))], axis=1).astype(np.int32)


@given(segments_strategy, st.integers(1, 64), st.integers(1, 16), st.integers(1, 600))
def test_every_row_is_in_one_tile_and_every_tile_has_all_its_splits(lengths, tile_tokens, num_heads, num_programs):
    tiling = tile_segments(descriptors(lengths), tile_tokens, num_heads, num_programs)
    splits_of_tiles: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for segment, first_token, split, num_splits in tiling.work.tolist():
        splits_of_tiles.setdefault((segment, first_token), []).append((split, num_splits))
    assert set(splits_of_tiles) == {(i, t) for i, (n, _) in enumerate(lengths) for t in range(0, n, tile_tokens)}
    for splits in splits_of_tiles.values():
        assert splits == [(i, len(splits)) for i in range(len(splits))]
        assert len(splits) <= MAX_SPLITS


@given(segments_strategy, st.integers(1, 64), st.integers(1, 16), st.integers(1, 600))
def test_tiles_that_are_split_come_first_and_are_all_combined(lengths, tile_tokens, num_heads, num_programs):
    tiling = tile_segments(descriptors(lengths), tile_tokens, num_heads, num_programs)
    work = tiling.work.tolist()
    assert all((entry[3] > 1) == (index < tiling.num_partials) for index, entry in enumerate(work))
    first_splits = [
        (segment, first_token, index, num_splits)
        for index, (segment, first_token, split, num_splits) in enumerate(work[: tiling.num_partials])
        if split == 0
    ]
    assert [tuple(entry) for entry in tiling.combinations.tolist()] == first_splits


def test_contexts_are_shared_out_evenly_the_longest_first():
    """40000 keys for 20 programs: with 2000 each they would be 22, with 2250 they are 19. 300 keys are not worth a split."""
    segments = descriptors([(1, 299), (1, 32_999), (1, 6_699)])
    tiling = tile_segments(segments, 1, 2, 40, min_split=2 * SPLIT_STEP)
    assert tiling.work[:, 0].tolist() == [1] * 15 + [2] * 3 + [0]
    assert tiling.combinations.tolist() == [[1, 0, 0, 15], [2, 0, 15, 3]]
    assert tiling.num_partials == 18


@given(segments_strategy, st.integers(1, 16), st.integers(1, 600))
def test_no_program_waits_for_others_if_there_is_room_for_two_of_each_tile(lengths, num_heads, num_programs):
    segments = descriptors([(1, before) for _, before in lengths])
    tiling = tile_segments(segments, 1, num_heads, num_programs)
    if num_programs // num_heads >= 2 * len(lengths):
        assert len(tiling.work) <= num_programs // num_heads


@pytest.mark.parametrize(
    ("num_segments", "num_splits"), [(1, 32), (4, 16), (16, 4), (30, 2), (60, 1), (64, 1), (200, 1)]
)
def test_a_decode_batch_has_as_many_splits_as_run_at_once(num_segments, num_splits):
    tiling = tile_decode_batch(num_segments, 8, 512)
    assert tiling.work.tolist() == [
        [i, 0, split, num_splits] for i in range(num_segments) for split in range(num_splits)
    ]
    assert len(tiling.combinations) == (num_segments if num_splits > 1 else 0)
