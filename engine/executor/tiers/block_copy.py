"""How blocks are copied between the tiers of a CUDA device: by its copy engines, or by a small kernel.

The kernel reads and writes pinned host memory. Either follows a list of copies, and knows no order between them.

Copy engines (DMA) reach the speed of the bus with a mebibyte or two per copy, and take no processor from the model. Below
that, each copy costs more than it moves (a page of one layer a copy: 22 % of PCIe 5), while a kernel of a few thread blocks
reaches it at any size. A block holds all layers in one run of memory, so that whole blocks are nearly always large enough;
the part of a block that some layers take is not in small models, nor in those with few KV heads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch

from engine.attention.device_clock import SecondsOf, seconds_on
from engine.attention.device_health import check_device
from engine.core.plan import BlockCopy
from engine.core.tier_table import CPU, GPU
from engine.errors import ConfigError, KernelBuildError
from engine.executor.tiers.cuda_copies import CopyMany, load_cuda_copies
from engine.executor.tiers.kv_store import BlockStore, ColdStore, KVStore

logger = logging.getLogger(__name__)

# Least bytes of a copy that the copy engines move at the speed of the bus.
MIN_DMA_BYTES = 1 << 20
# Share of the layers that wait for their KV together: what is copied before the first ones may start is not hidden.
GROUPS = 10
# Blocks that are copied to see which way is faster; and how much faster the kernel has to be, because it takes processors and
# bandwidth from the model.
MEASURED_BLOCKS = 32
MIN_KERNEL_GAIN = 1.1


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


def choose_copiers(
    option: str, gpu: KVStore, cpu: BlockStore, seconds_of: SecondsOf | None = None
) -> tuple[BlockCopier, BlockCopier]:
    """The copier for swap-ins and the one for swap-outs.

    option: `swap_copies`: "dma", "kernel", or "auto": the copy engines, unless the kernel is faster by more than it takes
    from the model. That is measured on the tiers themselves, whose blocks are not in use yet. seconds_of: None = by the
    clock. Raises ConfigError if the kernel was asked for and cannot run.
    """
    dma = DmaCopier(load_cuda_copies() if gpu.storage.device.type == "cuda" else None)
    if option == "dma" or min(gpu.num_blocks, cpu.num_blocks) == 0:
        return dma, dma
    try:
        kernel = _load_kernel(gpu, cpu)
    except KernelBuildError as error:
        if option == "kernel":
            raise ConfigError(
                f"swap_copies is 'kernel', but {error.message}; use 'dma'", param="swap_copies"
            ) from error
        logger.warning("swaps: by copy engines, whether or not a kernel would be faster; %s", error)
        return dma, dma
    if option == "kernel":
        return kernel(), kernel()
    seconds_of = seconds_of or seconds_on(gpu.storage.device, counts_launching=True)
    dma_s, kernel_s = (_measure(copier, gpu, cpu, seconds_of) for copier in (dma, kernel()))
    copiers: list[BlockCopier] = []
    for way, by_dma_s, by_kernel_s in zip(("in", "out"), dma_s, kernel_s, strict=True):
        use_dma = by_dma_s <= by_kernel_s * MIN_KERNEL_GAIN
        copiers.append(dma if use_dma else kernel())
        logger.info(
            "swaps %s: by %s, measured %.1f GB/s by copy engines and %.1f by the kernel (blocks of %.2f MiB)",
            way,
            "copy engines" if use_dma else "the kernel",
            *(_num_measured(gpu, cpu) * gpu.storage[0].nbytes / seconds / 1e9 for seconds in (by_dma_s, by_kernel_s)),
            gpu.storage[0].nbytes / (1 << 20),
        )
    return copiers[0], copiers[1]


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


def _measure(copier: BlockCopier, gpu: KVStore, cpu: BlockStore, seconds_of: SecondsOf) -> tuple[float, float]:
    """Seconds that it takes for some blocks: in, in the groups of layers that it would come in, and out."""
    num_blocks = _num_measured(gpu, cpu)
    copies = [BlockCopy(CPU, num_blocks - 1 - i, GPU, i) for i in range(num_blocks)]  # no two follow each other
    num_layers = len(gpu.layer_slices)
    columns = [columns_of(gpu, group) for group in layer_groups(num_layers, max_group_layers(gpu, copier))]

    def swap_in() -> None:
        for part in columns:
            copier.copy(gpu.storage, cpu.storage, copies, part)

    def swap_out() -> None:
        copier.copy(cpu.storage, gpu.storage, copies, columns_of(gpu, range(num_layers)))

    device = gpu.storage.device
    # As swaps will be: the default stream takes no batches of copies.
    with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
        return seconds_of(swap_in), seconds_of(swap_out)


def _num_measured(gpu: KVStore, cpu: BlockStore) -> int:
    return min(MEASURED_BLOCKS, gpu.num_blocks, cpu.num_blocks)


def _load_kernel(gpu: KVStore, cpu: BlockStore) -> type[BlockCopier]:
    """Raises KernelBuildError if it cannot run.

    Compiles it for all that swaps will copy, both ways; writes to block 0 of both tiers.
    """
    try:
        from engine.executor.tiers.block_copy_kernel import KernelCopier  # not above: triton is optional
    except ImportError as error:
        raise KernelBuildError(f"triton cannot be imported ({error}); pip install 'pensieve-ray[gpu]'") from error
    copier = KernelCopier()
    try:
        # What an element is depends on where the columns begin and end.
        num_layers = len(gpu.layer_slices)
        for layers in (range(num_layers), *layer_groups(num_layers, max_group_layers(gpu, copier))):
            copier.copy(cpu.storage, gpu.storage, [BlockCopy(GPU, 0, CPU, 0)], columns_of(gpu, layers))
            copier.copy(gpu.storage, cpu.storage, [BlockCopy(CPU, 0, GPU, 0)], columns_of(gpu, layers))
        if gpu.storage.device.type == "cuda":
            torch.cuda.synchronize(gpu.storage.device)
    except Exception as error:  # whatever triton, the compilers behind it and the driver raise
        check_device(gpu.storage.device)
        raise KernelBuildError(f"the copy kernel cannot run here: {error!r}") from error
    return KernelCopier
