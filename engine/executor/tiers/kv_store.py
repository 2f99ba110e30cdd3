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
from engine.executor.tiers.host_pages import map_pages, pin_pages


def block_bytes(layers: Sequence[LayerShape], chunk_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return int(sum(layer.numel_per_token for layer in layers) * chunk_size * dtype.itemsize)


class KVStore:
    """`num_blocks` blocks on `device`. storage: [num_blocks, elements per block]."""

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
        self.num_blocks = num_blocks
        self.chunk_size = chunk_size
        shape = (num_blocks, sum(layer.numel_per_token for layer in layers) * chunk_size)
        self._unpin: Callable[[], object] | None = None
        if device.type != "cpu" or 0 in shape:
            self.storage = torch.empty(shape, dtype=dtype, device=device)
        else:
            num_bytes = num_blocks * block_bytes(layers, chunk_size, dtype)
            try:
                pages = map_pages(num_bytes)
            except (OSError, OverflowError, ValueError) as error:
                raise ConfigError(
                    f"{num_bytes / 2**30:.1f} GiB of host memory cannot be allocated for a tier of {num_blocks} blocks; "
                    "lower gpu_memory_gib or num_gpu_blocks (GPU tier, on a CPU), or kv_offloading_size or num_cpu_blocks "
                    "(CPU tier)",
                    param="kv_offloading_size",
                ) from error
            if pin_memory:
                self._unpin = pin_pages(pages, num_bytes // num_blocks)
            self.storage = torch.frombuffer(pages, dtype=dtype).view(shape)
        self.layer_pools: list[tuple[torch.Tensor, torch.Tensor]] = []
        # The columns of `storage` that hold a layer.
        self.layer_slices: list[slice] = []
        offset = 0
        for layer in layers:
            pools = []
            self.layer_slices.append(slice(offset, offset + layer.numel_per_token * chunk_size))
            for dim in (layer.k_dim, layer.v_dim):
                size = layer.num_kv_heads * chunk_size * dim
                flat = self.storage[:, offset : offset + size]
                pools.append(flat.view(num_blocks, layer.num_kv_heads, chunk_size, dim))
                offset += size
            self.layer_pools.append((pools[0], pools[1]))

    @property
    def num_bytes(self) -> int:
        return int(self.storage.numel() * self.storage.element_size())

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Within this tier; every source is read before any target is written."""
        if copies:
            pairs = torch.tensor([(copy.source, copy.target) for copy in copies])
            sources, targets = to_device(pairs, self.storage.device).unbind(1)
            self.storage[targets] = self.storage[sources]

    def unpin(self) -> None:
        """Make pinned memory ordinary again, when no copy is under way. A store that is dropped does that itself."""
        if self._unpin is not None:
            self._unpin()
