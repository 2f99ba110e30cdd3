"""How a file may hold one weight: as several tensors, most often numbers of a few bits with a scale for each block of them.

Knows no kind of checkpoint, and reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Of a weight [out_features, in_features], the size of what has one scale.
Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How files hold a weight, as tensors that have the name of its layer and one of these names.

    mark: the part by which a weight that is held so is known.
    parts: those that it cannot be without, the mark among them.
    optional: those that it may have.
    target: what the weight itself is called.
    shape: of the weight, from its parts as safetensors' slices, of which it reads what little it needs. Raises ValueError if
        they do not fit each other, which says how.
    dequantize: the weight, float32, from its parts.
    """

    mark: str
    parts: tuple[str, ...]
    shape: Callable[[Mapping[str, Any]], tuple[int, ...]]
    dequantize: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    optional: tuple[str, ...] = ()
    target: str = "weight"


def find_block(shape: Sequence[int], grid: Sequence[int], declared: Sequence[Block]) -> Block:
    """The size of the blocks of a weight that have one scale each.

    shape: of the weight.
    grid: the shape of its scales: one number, one for each output feature, or one for each block.
    declared: the sizes that the checkpoint may have.

    Raises ValueError if none of them fits.
    """
    num_rows, num_columns = shape
    rows, columns = (*grid, 1, 1)[:2]
    for block in (*declared, (1, num_columns), (num_rows, num_columns)):
        if len(grid) <= 2 and (rows, columns) == (-(-num_rows // block[0]), -(-num_columns // block[1])):
            return block
    raise ValueError(
        f"scales of shape {list(grid)} do not fit a weight of {list(shape)} by what the configuration says"
    )


def num_bits(dtype: str) -> int:
    """Of a number, by what safetensors calls its dtype, such as F8_E4M3."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def spread(grid: torch.Tensor, shape: Sequence[int], block: Block) -> torch.Tensor:
    """Numbers of blocks, float32, as they apply to each element; a dimension of one block stays 1, for broadcasting."""
    grid = grid.float().reshape(-1, grid.shape[1] if grid.ndim > 1 else 1)
    for dim in range(2):
        if grid.shape[dim] > 1 and block[dim] > 1:
            grid = grid.repeat_interleave(block[dim], dim).narrow(dim, 0, shape[dim])
    return grid
