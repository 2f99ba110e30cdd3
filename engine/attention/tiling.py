"""Cuts a step's query segments into tiles of rows, and long contexts into splits.

For a kernel that runs one program for each split of a tile. Arithmetic on the host; knows no kernel and no layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from engine.attention.protocol import to_device

# Keys that the length of a split is a multiple of: whatever a split saves, its partial result has to be worth it.
SPLIT_STEP = 128
# Most splits of a tile: as many partial results are combined at once.
MAX_SPLITS = 32


@dataclass(frozen=True, slots=True)
class Tiling:
    """The programs of one attention call, those with the most keys first, because the last one decides.

    work: int32 [num_work, 4]: segment, first row of the tile counted from the segment's first, split, number of
        splits of the tile.
    combinations: int32 [num_combinations, 4]: the same of each tile that is split, but for the split the index in
        `work` of its first.
    num_partials: so many entries at the beginning of `work` belong to tiles that are split.
    tile_tokens: rows of a tile.
    Which keys a split covers follows from context_len, on the device; there may be none.
    """

    work: torch.Tensor
    combinations: torch.Tensor
    num_partials: int
    tile_tokens: int


def tile_segments(
    segments: np.ndarray, tile_tokens: int, programs_per_split: int, num_programs: int, min_split: int = SPLIT_STEP
) -> Tiling:
    """Tile a batch known on the host.

    Contexts are split so that no program has many more keys than if all keys were spread evenly over `num_programs`, which
    run at once, nor fewer than min_split. The tensors are in host memory.

    segments: as AttentionMetadata has them.
    programs_per_split: how many programs (heads) an entry of `work` stands for.
    """
    query_lens, context_lens = segments[:, 1].astype(np.int64), segments[:, 2].astype(np.int64)
    num_tiles = -(-query_lens // tile_tokens)
    segment = np.repeat(np.arange(len(segments)), num_tiles)
    first_token = (np.arange(len(segment)) - np.repeat(num_tiles.cumsum() - num_tiles, num_tiles)) * tile_tokens
    # Without the window, which differs between layers: a tile may be cut into more splits than its window fills.
    num_keys = (context_lens - query_lens)[segment] + np.minimum(first_token + tile_tokens, query_lens[segment])
    fair_share = max(min_split, -(-int(num_keys.sum()) * programs_per_split // num_programs))
    num_splits = _splits(num_keys, fair_share, num_programs // programs_per_split)
    order = np.argsort(-num_keys, kind="stable")  # the more keys the more splits: those that are split come first
    return _list_work(segment[order], first_token[order], num_splits[order], tile_tokens)


def _splits(num_keys: np.ndarray, fair_share: int, num_at_once: int) -> np.ndarray:
    """Of each tile. Up to twice the fair share each, if then none of them waits for others to end."""
    fair: np.ndarray = np.minimum(-(-num_keys // fair_share), MAX_SPLITS)
    for eighths in range(8, 17):
        fewer: np.ndarray = np.minimum(-(-num_keys * 8 // (fair_share * eighths)), MAX_SPLITS)
        if fewer.sum() <= num_at_once:
            return fewer
    return fair


def tile_decode_batch(num_segments: int, programs_per_split: int, num_programs: int) -> Tiling:
    """Tile any batch of so many segments of one row or none; depends on the arguments alone.

    All segments have as many splits as fit `num_programs`: with more, some would wait for others to end. The tensors are in
    host memory.
    """
    num_splits = min(MAX_SPLITS, max(1, num_programs // max(1, num_segments * programs_per_split)))
    segment = np.arange(num_segments)
    return _list_work(segment, np.zeros_like(segment), np.full_like(segment, num_splits), tile_tokens=1)


class RefilledTiling:
    """A tiling with room for any batch that some tensors have room for; see AttentionMetadata.is_refilled.

    work, combinations, num_partials, tile_tokens: as Tiling has them, in places on the device that stay the same. What a
    batch does not need is padding: tiles of the last segment, which has no rows.
    """

    def __init__(
        self,
        num_rows: int,
        num_segments: int,
        tile_tokens: int,
        programs_per_split: int,
        num_programs: int,
        min_split: int,
        device: torch.device,
    ) -> None:
        """num_rows, num_segments: of the tensors. The rest: as for `tile_segments`."""
        self._cut = partial(
            tile_segments,
            tile_tokens=tile_tokens,
            programs_per_split=programs_per_split,
            num_programs=num_programs,
            min_split=min_split,
        )
        # Splits are no more than run at once, or than tiles and these: see `tile_segments`. Only tiles with more keys than
        # the fair share are split, and of these there are no more than run at once.
        num_split = num_programs // programs_per_split
        num_work = num_rows // tile_tokens + num_segments + num_split
        padding = torch.tensor([num_segments - 1, 0, 0, 1], dtype=torch.int32)
        self._nothing = padding.repeat(num_work + num_split, 1)
        self._both = self._nothing.clone().to(device)
        self.work, self.combinations = self._both[:num_work], self._both[num_work:]
        self.num_partials = num_work if num_split else 0
        self.tile_tokens = tile_tokens

    def refill(self, segments: np.ndarray) -> None:
        """Tile another batch, in the current stream. segments: as AttentionMetadata has them, without padding."""
        tiling = self._cut(segments)
        both, num_work = self._nothing.clone(), len(self.work)
        assert len(tiling.work) <= num_work
        both[: len(tiling.work)] = tiling.work
        both[num_work : num_work + len(tiling.combinations)] = tiling.combinations
        self._both.copy_(to_device(both, self._both.device))


def _list_work(segment: np.ndarray, first_token: np.ndarray, num_splits: np.ndarray, tile_tokens: int) -> Tiling:
    first_work = num_splits.cumsum() - num_splits
    tiles = np.stack([segment, first_token, first_work, num_splits], axis=1).astype(np.int32)
    work = np.repeat(tiles, num_splits, axis=0)
    work[:, 2] = np.arange(len(work)) - work[:, 2]
    combinations = tiles[num_splits > 1]
    num_partials = int(num_splits[num_splits > 1].sum())
    return Tiling(torch.from_numpy(work), torch.from_numpy(combinations), num_partials, tile_tokens)
