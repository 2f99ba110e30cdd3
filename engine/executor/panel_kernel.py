"""Rows times a weight that oneDNN laid out, by the C++ kernel of panel_linear.cpp; on a CPU.

oneDNN's own products of few rows read a weight at half to two thirds of the speed of memory, and all of its calls take long
to begin. Where it has AMX it is the faster one for many rows, so both use the one layout that there is in memory. That
layout is oneDNN's own affair: whether a weight lies as the kernel reads it is tried.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from engine.errors import KernelBuildError
from engine.executor.native_product import NativeProduct
from engine.kernel_build import ISA_FLAGS, load_library

SOURCE = Path(__file__).with_name("panel_linear.cpp")
# As panel_linear.cpp lays out a weight: how many outputs a panel has, and to how many inputs it is padded, by dtype.
PANEL_LEN = 64
PADDING = {torch.float32: 16, torch.bfloat16: 32}
# Rows up to which it is faster where oneDNN has AMX for the dtype, whose units multiply 16 rows at once.
MAX_ROWS_WITH_AMX = 16
# Of products of random rows, in relation to their length: what is rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class _Weight(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
    )


class PanelWeight:
    """A weight [out_features, in_features] where oneDNN has put it."""

    def __init__(self, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """packed: of `weight`, by oneDNN.

        Raises KernelBuildError if there is no kernel for this machine, dtype or layout.
        """
        out_features, in_features = weight.shape
        kernel = _kernel_for(weight.dtype)
        padded_outputs = -(-out_features // PANEL_LEN) * PANEL_LEN
        padded_inputs = -(-in_features // PADDING[weight.dtype]) * PADDING[weight.dtype]
        if torch.ops.mkldnn._nbytes(packed) != padded_outputs * padded_inputs * weight.itemsize:
            raise KernelBuildError("oneDNN has laid out a weight in another way than the engine's kernel reads")
        self._packed = packed  # keeps the memory
        self._bias = None if bias is None else bias.float().contiguous()
        self._dtype = weight.dtype
        pointer = ctypes.pointer(
            _Weight(
                torch.ops.mkldnn.data_ptr(packed),
                None if self._bias is None else self._bias.data_ptr(),
                in_features,
                out_features,
            )
        )
        self.native = NativeProduct(kernel, pointer, in_features, out_features, max_rows(weight.dtype))
        self._check(weight, bias)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]. Raises ValueError for an input of other features, or another dtype."""
        if x.dtype != self._dtype:
            raise ValueError(f"an input of {x.dtype} for a weight of {self._dtype}")
        return self.native.multiply(x)

    @torch.inference_mode()
    def _check(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Raise KernelBuildError if products differ from torch's."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, self.native.in_features, generator=generator).to(self._dtype)
        expected, actual = F.linear(x, weight, bias).float(), self.multiply(x).float()
        if not (actual - expected).norm() <= TOLERANCE[self._dtype] * expected.norm():
            raise KernelBuildError("the engine's kernel multiplies what oneDNN laid out wrongly")


def max_rows(dtype: torch.dtype) -> int:
    """Rows up to which the kernel is the faster one, or as fast (float32 of 200 rows and more: within 1 %)."""
    has_units = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return MAX_ROWS_WITH_AMX if has_units else sys.maxsize


def _kernel_for(dtype: torch.dtype) -> Any:
    """Raises KernelBuildError if there is none."""
    capability: str = torch.backends.cpu.get_cpu_capability()
    flags = ISA_FLAGS.get(capability, ())
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        capability, flags = "AVX512_BF16", (*flags, "-mavx512bf16")
    if not flags or dtype not in PADDING or (dtype == torch.bfloat16 and capability != "AVX512_BF16"):
        raise KernelBuildError(f"there is no kernel of the engine's own in {dtype} on this processor")
    return load_built_for(capability, flags)


@functools.cache
def load_built_for(capability: str, isa_flags: tuple[str, ...]) -> Any:
    """The function of the library for an instruction set, built unless that was done.

    capability, isa_flags: its name, and the compiler's flags.

    Raises KernelBuildError.
    """
    function = load_library(SOURCE, "linear layers", capability, ("-fopenmp", *isa_flags)).panel_multiply
    addresses = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function.argtypes = (ctypes.c_int, *addresses, ctypes.c_int64, ctypes.c_int)
    function.restype = None
    return function
