"""The memory behind the block ids of one tier. Copies blocks; never decides which.

A block holds the KV of `chunk_size` tokens for all layers in one run of memory, so that a chunk moves between tiers as one
copy; within it layer by layer, K before V:

    block 0: | layer 0 K | layer 0 V | layer 1 K | layer 1 V | ...     K: [num_kv_heads, chunk_size, k_dim]
    block 1: | ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.attention.protocol import LayerShape, to_device
from engine.core.plan import BlockCopy
from engine.errors import ConfigError
from engine.executor.tiers.cold_format import ColdFormat, TokenSpan
from engine.executor.tiers.host_pages import map_pages, pin_pages


def block_bytes(layers: Sequence[LayerShape], chunk_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return int(sum(layer.numel_per_token for layer in layers) * chunk_size * dtype.itemsize)


class BlockStore:
    """`num_blocks` blocks of one tier. storage: a row for each block.

    token_spans: the bytes of a block that belong to single tokens.
    """

    storage: torch.Tensor
    token_spans: tuple[TokenSpan, ...]

    def __init__(self, num_blocks: int, chunk_size: int) -> None:
        self.num_blocks, self.chunk_size = num_blocks, chunk_size
        self._unpin: Callable[[], object] | None = None

    @property
    def num_bytes(self) -> int:
        return int(self.storage.numel() * self.storage.element_size())

    def unpin(self) -> None:
        """Make pinned memory ordinary again, when no copy is under way. A store that is dropped does that itself."""
        if self._unpin is not None:
            self._unpin()

    def _take_host_memory(self, block_bytes: int, *, pin_memory: bool) -> torch.Tensor:
        """uint8 [num_blocks * block_bytes], at least one. Raises ConfigError if it cannot be had, or pinned."""
        num_bytes = self.num_blocks * block_bytes
        try:
            pages = map_pages(num_bytes)
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"{num_bytes / 2**30:.1f} GiB of host memory cannot be allocated for a tier of {self.num_blocks} blocks; "
                "lower gpu_memory_gib or num_gpu_blocks (GPU tier, on a CPU), or kv_offloading_size or num_cpu_blocks "
                "(CPU tier)",
                param="kv_offloading_size",
            ) from error
        if pin_memory:
            self._unpin = pin_pages(pages, block_bytes)
        return torch.frombuffer(pages, dtype=torch.uint8)


class ColdStore(BlockStore):
    """Blocks of the CPU tier as records in fewer bits than the GPU tier has, see cold_format. storage: uint8."""

    def __init__(self, cold_format: ColdFormat, *, num_blocks: int, pin_memory: bool = False) -> None:
        """Take the memory; see KVStore."""
        super().__init__(num_blocks, cold_format.chunk_size)
        self.format = cold_format
        self.token_spans = tuple(cold_format.token_spans())
        if num_blocks:
            storage = self._take_host_memory(cold_format.block_bytes, pin_memory=pin_memory)
            self.storage = storage.view(num_blocks, cold_format.block_bytes)
        else:
            self.storage = torch.empty(0, cold_format.block_bytes, dtype=torch.uint8)


class KVStore(BlockStore):
    """Blocks as attention reads them, on `device`. storage: [num_blocks, elements per block]."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        num_blocks: int,
        chunk_size: int,
        dtype: torch.dtype,
        device: torch.device,
        pin_memory: bool = False,
    ) -> None:
        """Take the memory.

        pin_memory: for the CPU tier of a CUDA device, which copies at full speed only from and to pinned memory.
        Raises ConfigError if so much host memory cannot be had, or pinned.
        """
        super().__init__(num_blocks, chunk_size)
        shape = (num_blocks, sum(layer.numel_per_token for layer in layers) * chunk_size)
        if device.type != "cpu" or 0 in shape:
            self.storage = torch.empty(shape, dtype=dtype, device=device)
        else:
            storage = self._take_host_memory(block_bytes(layers, chunk_size, dtype), pin_memory=pin_memory)
            self.storage = storage.view(dtype).view(shape)
        self.layer_pools: list[tuple[torch.Tensor, torch.Tensor]] = []
        # The columns of `storage` that hold a layer.
        self.layer_slices: list[slice] = []
        spans, offset = [], 0
        for layer in layers:
            pools = []
            self.layer_slices.append(slice(offset, offset + layer.numel_per_token * chunk_size))
            for dim in (layer.k_dim, layer.v_dim):
                size = layer.num_kv_heads * chunk_size * dim
                flat = self.storage[:, offset : offset + size]
                pools.append(flat.view(num_blocks, layer.num_kv_heads, chunk_size, dim))
                spans.append(TokenSpan(offset * dtype.itemsize, layer.num_kv_heads, dim * dtype.itemsize))
                offset += size
            self.layer_pools.append((pools[0], pools[1]))
        self.token_spans = tuple(spans)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Within this tier; every source is read before any target is written."""
        if copies:
            pairs = torch.tensor([(copy.source, copy.target) for copy in copies])
            sources, targets = to_device(pairs, self.storage.device).unbind(1)
            self.storage[targets] = self.storage[sources]
