"""Puts many copies between GPU memory and pinned host memory into a CUDA stream with one call.

torch's `copy_` takes about 10 microseconds of the launching thread for each copy. The thread that launches a step's layers
also starts their swap-ins, so that this time is added to the step: nothing of the copying would be hidden. CUDA's runtime is
called here directly, by ctypes; it is the one that torch has loaded.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.errors import DeviceFailedError

logger = logging.getLogger(__name__)

# cudaMemcpySrcAccessOrderStream: the source is read in stream order. With "any" order a copy from the GPU may read what the
# stream's wait was to keep it from reading.
_ORDER_OF_STREAM = 1
_PREFER_OVERLAP_WITH_COMPUTE = 1  # cudaMemcpyFlagPreferOverlapWithCompute
_MEMCPY_DEFAULT = 4  # cudaMemcpyDefault: the direction follows from the addresses

# (addresses of targets, of sources, bytes of each copy, all int64 [n] and contiguous; stream handle): enqueue them.
CopyMany = Callable[[np.ndarray, np.ndarray, np.ndarray, int], None]


class _Location(ctypes.Structure):
    """cudaMemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location", _Location),
        ("target_location", _Location),
        ("flags", ctypes.c_uint),
    )


class CudaCopies:
    """The copies of CUDA's runtime library, in batches if it has them (12.8 and later).

    library: libcudart, loaded. is_before_13: `cudaMemcpyBatchAsync` had one parameter more before CUDA 13.
    """

    def __init__(self, library: Any, *, is_before_13: bool) -> None:
        self._copy = library.cudaMemcpyAsync
        self._copy.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
            *(ctypes.c_int, ctypes.c_void_p),
        )
        self._library = library
        self._copy_batch = getattr(library, "cudaMemcpyBatchAsync", None)
        self._failed_index = (ctypes.byref(ctypes.c_size_t()),) if is_before_13 else ()
        self._attributes = _Attributes(source_access_order=_ORDER_OF_STREAM, flags=_PREFER_OVERLAP_WITH_COMPUTE)
        self._first = ctypes.c_size_t(0)

    def __call__(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        """Enqueue the copies, in any order among themselves.

        targets, sources: addresses, int64 [n]; sizes: bytes, int64 [n]. stream: its handle; 0, the default stream, takes no
        batches. A batch that CUDA refuses is copied one by one, and so are all behind it. Raises DeviceFailedError.
        """
        if self._copy_batch is not None and stream != 0 and len(sizes) > 1:
            error = self._copy_batch(
                *(ctypes.c_void_p(array.ctypes.data) for array in (targets, sources, sizes)),
                ctypes.c_size_t(len(sizes)),
                ctypes.byref(self._attributes),
                ctypes.byref(self._first),
                ctypes.c_size_t(1),
                *self._failed_index,
                ctypes.c_void_p(stream),
            )
            if not error:
                return
            logger.warning(
                "swaps: CUDA takes no batches of copies here (error %d), so each is started by itself", error
            )
            self._copy_batch = None
            self._library.cudaGetLastError()  # or torch would report it later
        for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            self._check(self._copy(target, source, size, _MEMCPY_DEFAULT, stream))

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise DeviceFailedError(f"CUDA could not start the copies of a swap (error {error}); restart the process")


def load_cuda_copies() -> CopyMany | None:
    """CUDA's own copies; None, with a line in the log, if its runtime library cannot be found."""
    major = int((torch.version.cuda or "0").split(".")[0])
    try:
        library = ctypes.CDLL(f"libcudart.so.{major}")
    except OSError as error:
        logger.warning("swaps: each copy is started by torch, which is slower: %s", error)
        return None
    return CudaCopies(library, is_before_13=major < 13)
