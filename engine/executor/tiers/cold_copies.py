"""Copies blocks to and from the cold tiers' records in host memory: by the C++ kernel of cold_copy.cpp, or by the reference.

For a GPU tier in host memory; on a GPU, cold_copy_kernel.py does it.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch

from engine import kernel_build
from engine.core.plan import BlockCopy
from engine.errors import KernelBuildError
from engine.executor.tiers.cold_format import LEVELS
from engine.executor.tiers.kv_store import ColdStore, KVStore
from engine.kernel_build import ISA_FLAGS

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cold_copy.cpp")
# As cold_copy.cpp numbers them.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class ReferenceColdCopies:
    """By torch's operations; see HostCopies."""

    def __init__(self, gpu: KVStore, cpu: ColdStore) -> None:
        self._gpu, self._cpu = gpu.storage, cpu.storage
        self._format = cpu.format

    def swap_out(self, copy: BlockCopy) -> None:
        """Encode a block."""
        self._cpu[copy.target] = self._format.encode(self._gpu[copy.source], copy.num_tokens)

    def swap_in(self, copy: BlockCopy, layer: int) -> None:
        """Decode a layer of a block."""
        self._format.decode(self._cpu[copy.source], self._gpu[copy.target], [layer])


class ColdCopies:
    """By the C++ kernel, in the thread that calls, without the interpreter's lock; see HostCopies."""

    def __init__(self, library: Any, gpu: KVStore, cpu: ColdStore) -> None:
        """library: of `load_library`."""
        self._encode, self._decode = library.cold_encode, library.cold_decode
        self._stores = gpu, cpu  # keeps the memory
        self._gpu, self._cpu = gpu.storage, cpu.storage
        num_layers = len(cpu.format.layers)
        self._units = [cpu.format.units([layer]) for layer in range(num_layers)]
        self._all_units = cpu.format.units(range(num_layers))
        self._shape = (ctypes.c_int64(gpu.chunk_size), ctypes.c_int(LEVELS.get(cpu.format.kind, 0)))
        self._dtype = ctypes.c_int(_DTYPES[gpu.storage.dtype])

    def swap_out(self, copy: BlockCopy) -> None:
        """Encode a block."""
        num_tokens = self._stores[0].chunk_size if copy.num_tokens is None else copy.num_tokens
        self._encode(
            self._dtype,
            _address(self._gpu, copy.source),
            _address(self._cpu, copy.target),
            *_table(self._all_units),
            *self._shape,
            ctypes.c_int64(num_tokens),
        )

    def swap_in(self, copy: BlockCopy, layer: int) -> None:
        """Decode a layer of a block."""
        source, target = _address(self._cpu, copy.source), _address(self._gpu, copy.target)
        self._decode(self._dtype, source, target, *_table(self._units[layer]), *self._shape)


def _address(storage: torch.Tensor, block: int) -> ctypes.c_void_p:
    """Raises IndexError if there is no such block."""
    if not 0 <= block < len(storage):
        raise IndexError(f"there is no block {block} among {len(storage)}")
    return ctypes.c_void_p(storage.data_ptr() + block * storage.stride(0) * storage.element_size())


def _table(units: Any) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return ctypes.c_void_p(units.ctypes.data), ctypes.c_int64(len(units))


def load_library() -> Any:
    """Build the kernel unless that was done, and load it. Raises KernelBuildError."""
    capability: str = torch.backends.cpu.get_cpu_capability()
    # The reference rounds after each operation, so the kernel must not join two of them.
    flags = ("-ffp-contract=off", *ISA_FLAGS.get(capability, ()))
    return kernel_build.load_library(SOURCE, "cold tier", capability, flags)


def make_cold_copies(gpu: KVStore, cpu: ColdStore) -> ColdCopies | ReferenceColdCopies:
    """By the kernel if it is built or can be; else, with a line in the log, by the reference, which is many times slower."""
    try:
        return ColdCopies(load_library(), gpu, cpu)
    except KernelBuildError as error:
        logger.warning("kv_cold_dtype: blocks are converted by torch's operations, which is slow; %s", error)
        return ReferenceColdCopies(gpu, cpu)
