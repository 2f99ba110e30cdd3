# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that Python knows.
"""The copy kernel: moves parts of blocks between GPU memory and pinned host memory.

A GPU reads and writes pinned memory in place. It runs as a few large programs, because the bus is the limit and the
processors are the model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from engine.attention.protocol import to_device
from engine.core.plan import BlockCopy

IS_INTERPRETED: bool = triton.knobs.runtime.interpret
# 8 programs of 1024 threads, each of which has 32 bytes under way.
NUM_PROGRAMS = 8
_NUM_WARPS = 32
_TILE_ELEMENTS = 4096
# Widest first: elements are moved as the widest integers that all offsets are multiples of.
_CARRIERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class KernelCopier:
    """One launch for any number of blocks. Use one for each stream: what it keeps belongs to the stream."""

    def __init__(self) -> None:
        self._copies: Sequence[BlockCopy] = ()
        self._pairs: torch.Tensor | None = None

    def copy(self, target: torch.Tensor, source: torch.Tensor, copies: Sequence[BlockCopy], columns: slice) -> None:
        """See BlockCopier. Host memory has to be pinned."""
        device = target.device if target.device.type == "cuda" else source.device
        carrier = _widest_carrier(source, columns)
        scale = source.dtype.itemsize
        first, num_columns = columns.start * scale, (columns.stop - columns.start) * scale
        first, num_columns = first // carrier.itemsize, num_columns // carrier.itemsize
        to, from_ = (storage.view(carrier)[:, first:] for storage in (target, source))
        num_tiles = len(copies) * -(-num_columns // _TILE_ELEMENTS)
        with torch.cuda.device_of(
            target if target.device.type == "cuda" else source
        ):  # triton launches on the current one
            _copy_kernel[(min(NUM_PROGRAMS, num_tiles),)](
                to,
                from_,
                self._on_device(copies, device),
                len(copies),
                num_columns,
                to.stride(0),
                from_.stride(0),
                TILE=_TILE_ELEMENTS,
                num_warps=_NUM_WARPS,
            )

    def _on_device(self, copies: Sequence[BlockCopy], device: torch.device) -> torch.Tensor:
        """int64 [len(copies), 2]: target, source. The groups of layers of one swap-in share it."""
        if self._pairs is None or copies is not self._copies:
            pairs = torch.tensor([(copy.target, copy.source) for copy in copies])
            # Allocated, used and given back in the current stream.
            self._copies, self._pairs = copies, to_device(pairs, device)
        return self._pairs


def _widest_carrier(storage: torch.Tensor, columns: slice) -> torch.dtype:
    scale = storage.dtype.itemsize
    offsets = (storage.shape[1] * scale, columns.start * scale, columns.stop * scale)
    return next(carrier for carrier in _CARRIERS if all(offset % carrier.itemsize == 0 for offset in offsets))


@triton.jit(do_not_specialize=["num_pairs"])
def _copy_kernel(
    target,
    source,
    pairs,
    num_pairs,
    num_columns,
    target_stride,
    source_stride,
    TILE: tl.constexpr,
):
    """A program copies every NUM_PROGRAMSth tile of all the parts of blocks."""
    tiles_each = tl.cdiv(num_columns, TILE)
    for tile in range(tl.program_id(0), num_pairs * tiles_each, tl.num_programs(0)):
        pair = pairs + (tile // tiles_each) * 2
        column = (tile % tiles_each) * TILE + tl.arange(0, TILE)
        to, from_ = tl.load(pair), tl.load(pair + 1)
        mask = column < num_columns
        values = tl.load(source + from_ * source_stride + column, mask=mask)
        tl.store(target + to * target_stride + column, values, mask=mask)
