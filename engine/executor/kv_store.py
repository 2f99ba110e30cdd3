"""The memory behind the block ids of one tier. Copies blocks; never decides which.

A block holds the KV of `chunk_size` tokens for all layers in one run of memory, so that a chunk moves between tiers as one
copy; within it layer by layer, K before V:

    block 0: | layer 0 K | layer 0 V | layer 1 K | layer 1 V | ...     K: [num_kv_heads, chunk_size, k_dim]
    block 1: | ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.attention.metadata import LayerShape, to_device
from engine.core.plan import BlockCopy
from engine.errors import ConfigError

# cudaHostRegisterPortable and cudaHostRegisterMapped: pinned for every device of the process, and kernels may use it.
PORTABLE_AND_MAPPED = 1 | 2


def block_bytes(layers: Sequence[LayerShape], chunk_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return sum(layer.numel_per_token for layer in layers) * chunk_size * dtype.itemsize


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
        """pin_memory: for the CPU tier of a CUDA device, which copies at full speed only from and to pinned memory. Raises
        ConfigError if so much host memory cannot be had, or pinned."""
        self.num_blocks = num_blocks
        self.chunk_size = chunk_size
        numel = sum(layer.numel_per_token for layer in layers) * chunk_size
        try:
            self.storage = torch.empty(num_blocks, numel, dtype=dtype, device=device)
        except RuntimeError as error:
            if device.type != "cpu":  # torch.OutOfMemoryError, which others explain
                raise
            num_gib = num_blocks * block_bytes(layers, chunk_size, dtype) / 2**30
            raise ConfigError(
                f"{num_gib:.1f} GiB of host memory cannot be had for a tier of {num_blocks} blocks; lower gpu_memory_gib or "
                "num_gpu_blocks (GPU tier, on a CPU), or kv_offloading_size or num_cpu_blocks (CPU tier)",
                param="kv_offloading_size",
            ) from error
        self._is_pinned = False
        if pin_memory and num_blocks > 0:
            self._pin()
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
        return self.storage.numel() * self.storage.element_size()

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Within this tier; every source is read before any target is written."""
        if copies:
            pairs = torch.tensor([(copy.source, copy.target) for copy in copies])
            sources, targets = to_device(pairs, self.storage.device).unbind(1)
            self.storage[targets] = self.storage[sources]

    def _pin(self) -> None:
        """In place. torch's allocator of pinned memory rounds up to a power of two: it would take 64 GiB for 40."""
        address, num_bytes = self.storage.data_ptr(), self.storage.nbytes
        error = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, PORTABLE_AND_MAPPED))
        if error:
            raise ConfigError(
                f"{num_bytes / 2**30:.1f} GiB of host memory cannot be pinned for the CPU tier (CUDA error {error}); lower "
                "kv_offloading_size or num_cpu_blocks",
                param="kv_offloading_size",
            )
        self._is_pinned = True

    def unpin(self) -> None:
        """Give pinned memory back to the system; to be called before the store is forgotten, when no copy is under way."""
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.storage.data_ptr())
            self._is_pinned = False
