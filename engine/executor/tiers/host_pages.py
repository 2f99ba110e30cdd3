"""Whole pages of host memory, straight from the system, and their registration with CUDA ("pinned" memory).

Knows neither blocks nor tiers.
"""

from __future__ import annotations

import math
import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch

from engine.errors import ConfigError

GIB = 1 << 30
# cudaHostRegisterPortable and cudaHostRegisterMapped: pinned for every device of the process, and kernels may use it.
_PORTABLE_AND_MAPPED = 1 | 2
# Bytes of one registration: drivers were seen to refuse 512 GiB in one call.
MAX_PIECE_BYTES = 64 * GIB


def map_pages(num_bytes: int) -> memoryview:
    """Pages of zeros that belong to nothing else, given back to the system with the last object that refers to the view.

    Private, so that the system may put huge pages there, and not taken before they are touched. num_bytes: more than 0.
    Raises OSError, OverflowError or ValueError if there are not so many.
    """
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def pin_pages(pages: memoryview, unit_bytes: int) -> weakref.finalize[..., memoryview]:
    """Register pages with CUDA, whose copy engines are at full speed with such memory only.

    They are taken from the system first, as huge pages if it has them, by all of torch's threads: to register pages that
    are there already takes a fraction of the time. pages: of `map_pages`. unit_bytes: no registration ends inside one of the
    units that the memory is divided into. Returns what undoes it, called when nothing copies any more; otherwise that
    happens before the pages go back to the system, and when the process ends. Raises ConfigError, with nothing registered.
    """
    with suppress(AttributeError, OSError):  # a system without huge pages
        pages.obj.madvise(mmap.MADV_HUGEPAGE)  # type: ignore[attr-defined]
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    memory[:: mmap.PAGESIZE] = 0
    cudart: Any = torch.cuda.cudart()
    registered: list[int] = []
    # The view dies before what it is a view of: the finalizer holds that.
    unpin = weakref.finalize(pages, _unregister, cudart, registered, pages.obj)
    step = _piece_bytes(unit_bytes)
    for start in range(0, len(memory), step):
        address, num_bytes = memory.data_ptr() + start, min(step, len(memory) - start)
        error = int(cudart.cudaHostRegister(address, num_bytes, _PORTABLE_AND_MAPPED))
        if error:
            unpin()
            raise ConfigError(
                f"{len(memory) / GIB:.1f} GiB of host memory cannot be pinned for the CPU tier (CUDA error {error}, after "
                f"{start / GIB:.1f} GiB); lower kv_offloading_size or num_cpu_blocks, and restart the process, "
                "because CUDA reports the error again at a later operation",
                param="kv_offloading_size",
            )
        registered.append(address)
    return unpin


def _piece_bytes(unit_bytes: int) -> int:
    """Bytes of one registration: whole units and whole pages, because no page may be registered twice."""
    least = math.lcm(unit_bytes, mmap.PAGESIZE)
    return max(1, MAX_PIECE_BYTES // least) * least


def _unregister(cudart: Any, addresses: list[int], _pages: object) -> None:
    while addresses:
        cudart.cudaHostUnregister(addresses.pop())
