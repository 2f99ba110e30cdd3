"""How blocks are copied between the tiers of a CUDA device: by its copy engines.

They (DMA) reach the speed of the bus with a mebibyte or two per copy, and take no processor from the model. Below that, each
copy costs more than it moves (a page of one layer a copy: 22 % of PCIe 5). A block holds all layers in one run of memory, so
that whole blocks are nearly always large enough; the part of a block that some layers take is not in small models, nor in
those with few KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from engine.attention.device_health import check_device
from engine.core.plan import BlockCopy
from engine.core.tier_table import CPU, GPU
from engine.errors import ConfigError
from engine.executor.tiers.cuda_copies import CopyMany
from engine.executor.tiers.kv_store import ColdStore, KVStore

# Least bytes of a copy that the copy engines move at the speed of the bus.
MIN_DMA_BYTES = 1 << 20
# Share of the layers that wait for their KV together: what is copied before the first ones may start is not hidden.
GROUPS = 10


class BlockCopier(Protocol):
    """Copies columns of blocks from one storage [num_blocks, elements] to another, in the stream that is current."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, copies: Sequence[BlockCopy], columns: slice) -> None: ...


class DmaCopier:
    """A copy for each block, or, if whole blocks follow each other on both sides, for each row of them.

    copy_many: starts all copies of a call at once; None = torch's copies, one by one.
    """

    def __init__(self, copy_many: CopyMany | None = None) -> None:
        self._copy_many = copy_many

    def copy(self, target: torch.Tensor, source: torch.Tensor, copies: Sequence[BlockCopy], columns: slice) -> None:
        is_whole = columns.stop - columns.start == source.shape[1]
        runs = _runs(copies) if is_whole else [(index, 1) for index in range(len(copies))]
        if self._copy_many is not None:
            device = target.device if target.device.type == "cuda" else source.device
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            self._copy_many(*_addresses(target, source, copies, runs, columns), stream)
            return
        for first, length in runs:
            to, from_ = copies[first].target, copies[first].source
            target[to : to + length, columns].copy_(source[from_ : from_ + length, columns], non_blocking=True)


def _addresses(
    target: torch.Tensor,
    source: torch.Tensor,
    copies: Sequence[BlockCopy],
    runs: Sequence[tuple[int, int]],
    columns: slice,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each run of blocks goes, where it comes from, and its bytes, all int64 [number of runs]."""
    itemsize = source.dtype.itemsize
    rows = np.array([(copies[first].target, copies[first].source, length) for first, length in runs], np.int64)
    to, from_, lengths = rows.reshape(-1, 3).T
    offset = columns.start * itemsize
    return (
        target.data_ptr() + to * (target.stride(0) * itemsize) + offset,
        source.data_ptr() + from_ * (source.stride(0) * itemsize) + offset,
        lengths * ((columns.stop - columns.start) * itemsize),
    )


def _runs(copies: Sequence[BlockCopy]) -> list[tuple[int, int]]:
    """(index of the first, length) of each row of copies whose sources and targets follow each other."""
    runs: list[tuple[int, int]] = []
    for index, copy in enumerate(copies):
        if runs:
            first, length = runs[-1]
            if (copy.source - length, copy.target - length) == (copies[first].source, copies[first].target):
                runs[-1] = (first, length + 1)
                continue
        runs.append((index, 1))
    return runs


def layer_groups(num_layers: int, max_layers: int) -> list[range]:
    """The layers, cut into groups that are swapped in together.

    They grow, doubling what came before, up to `max_layers`: the first layers can start early, and while they run,
    larger copies come.
    """
    groups: list[range] = []
    start = 0
    while start < num_layers:
        length = min(max(1, start), max_layers, num_layers - start)
        groups.append(range(start, start + length))
        start += length
    return groups


def max_group_layers(store: KVStore, copier: BlockCopier) -> int:
    """As many layers as are worth a copy, but few enough for most of the copying to be hidden.

    More than that only if copies would be too small otherwise.
    """
    num_layers = len(store.layer_slices)
    few = max(1, num_layers // GROUPS)
    if not isinstance(copier, DmaCopier):
        return few
    layer_bytes = store.storage[0].nbytes // num_layers
    return int(max(few, -(-MIN_DMA_BYTES // max(1, layer_bytes))))


def columns_of(store: KVStore, layers: range) -> slice:
    """The columns of `storage` that hold them."""
    return slice(store.layer_slices[layers.start].start, store.layer_slices[layers.stop - 1].stop)


def load_cold_copiers(gpu: KVStore, cpu: ColdStore) -> tuple[BlockCopier, BlockCopier]:
    """The copiers for swap-ins and swap-outs that convert: kernels, as copy engines cannot.

    Compiles them; writes to block 0 of both tiers. Raises ConfigError if they cannot run.
    """
    remedy = "use 'same', or pip install 'pensieve-ray[gpu]'"
    try:
        from engine.executor.tiers.cold_copy_kernel import ColdDecoder, ColdEncoder  # not above: triton is optional
    except ImportError as error:
        raise ConfigError(f"kv_cold_dtype needs triton ({error}); {remedy}", param="kv_cold_dtype") from error
    copiers = ColdDecoder(gpu, cpu.format), ColdEncoder(cpu.format)
    if not min(gpu.num_blocks, cpu.num_blocks):
        return copiers
    everything = slice(0, gpu.storage.shape[1])
    try:
        copiers[1].copy(cpu.storage, gpu.storage, [BlockCopy(GPU, 0, CPU, 0)], everything)
        copiers[0].copy(gpu.storage, cpu.storage, [BlockCopy(CPU, 0, GPU, 0)], everything)
        if gpu.storage.device.type == "cuda":
            torch.cuda.synchronize(gpu.storage.device)
    except Exception as error:  # whatever triton, the compilers behind it and the driver raise
        check_device(gpu.storage.device)
        raise ConfigError(
            f"kv_cold_dtype: its copy kernels cannot run here: {error!r}; {remedy}", param="kv_cold_dtype"
        ) from error
    return copiers
