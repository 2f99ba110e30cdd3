"""Weights as integers with a scale for each block of 32 inputs, multiplied by the C++ kernel of block_linear.cpp.

The kernel is built once per machine, if there is a compiler. Knows neither models nor options.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from engine import kernel_build
from engine.executor.native_product import DTYPES, NativeProduct
from engine.kernel_build import ISA_FLAGS

SOURCE = Path(__file__).with_name("block_linear.cpp")
# As block_linear.cpp lays out weights.
PANEL_LEN, BLOCK_LEN, GROUP_LEN = 16, 32, 4
# Of how block_linear.cpp rounds weights and inputs: part of the identity of KV. Raise it if that changes.
ROUNDING_VERSION = 1
NUM_GROUPS = BLOCK_LEN // GROUP_LEN


class _Weight(ctypes.Structure):
    _fields_ = (
        ("integers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("num_bits", ctypes.c_int64),
        ("num_terms", ctypes.c_int64),
    )


class BlockWeight:
    """A weight [out_features, in_features] and a bias, laid out for the kernel.

    num_bits: of a weight, 8 or 4.
    num_terms: integers of 8 bits for an input: 1, or 2 in blocks with a value far beyond the others of its row.

    Raises KernelBuildError if the kernel cannot be built.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, num_bits: int, num_terms: int) -> None:
        self.out_features, self.in_features = weight.shape
        self._num_bits, self._num_terms = num_bits, num_terms
        panels = -(-self.out_features // PANEL_LEN)
        blocks = -(-self.in_features // BLOCK_LEN)
        num_bytes = NUM_GROUPS * PANEL_LEN * GROUP_LEN * num_bits // 8
        self._integers = torch.empty(panels, blocks, num_bytes, dtype=torch.uint8)
        self._scales = torch.empty(panels, blocks, PANEL_LEN, dtype=torch.bfloat16)
        self._bias = None if bias is None else bias.float().contiguous()
        weight = weight.contiguous()
        load_library().block_pack(
            DTYPES[weight.dtype],
            weight.data_ptr(),
            self.in_features,
            self.out_features,
            num_bits,
            self._integers.data_ptr(),
            self._scales.data_ptr(),
            torch.get_num_threads(),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the integers and the scales."""
        return int(self._integers.nbytes + self._scales.nbytes)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        return self.native.multiply(x)

    def unpack(self) -> torch.Tensor:
        """The weight as it is multiplied, [out_features, in_features] in float32."""
        panels, blocks, _ = self._integers.shape
        integers = self._integers
        if self._num_bits == 4:
            integers = torch.cat([integers & 15, integers >> 4], dim=-1)
        integers = integers.view(panels, blocks, NUM_GROUPS, PANEL_LEN, GROUP_LEN).permute(0, 3, 1, 2, 4)
        values = integers.reshape(panels * PANEL_LEN, blocks, BLOCK_LEN).float() - (1 << (self._num_bits - 1))
        scales = self._scales.permute(0, 2, 1).reshape(panels * PANEL_LEN, blocks, 1).float()
        dense: torch.Tensor = (values * scales).flatten(1)[: self.out_features, : self.in_features]
        return dense

    @functools.cached_property
    def native(self) -> NativeProduct:
        """For C++ code; only as long as its tensors are where they are."""
        weight = _Weight(
            self._integers.data_ptr(),
            self._scales.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.in_features,
            self.out_features,
            self._num_bits,
            self._num_terms,
        )
        function = load_library().block_multiply
        return NativeProduct(function, ctypes.pointer(weight), self.in_features, self.out_features, sys.maxsize)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "native"}


@functools.cache
def load_library() -> Any:
    """Build the kernel unless that was done, and load it. Raises KernelBuildError."""
    return load_built_for(*instruction_set())


def instruction_set() -> tuple[str, tuple[str, ...]]:
    """What this processor has, by torch's own capability: its name, and the compiler's flags."""
    capability: str = torch.backends.cpu.get_cpu_capability()
    flags = ISA_FLAGS.get(capability, ())
    if capability == "AVX512" and torch.cpu._is_vnni_supported():
        return "AVX512_VNNI", (*flags, "-mavx512vnni", "-mprefer-vector-width=512")
    return capability, flags


def is_fast() -> bool:
    """Whether products are faster than those of unquantised weights on this processor."""
    return torch.backends.cpu.get_cpu_capability() in ISA_FLAGS


def load_built_for(capability: str, isa_flags: tuple[str, ...]) -> Any:
    """The kernel for an instruction set.

    capability, isa_flags: its name, and the compiler's flags.

    Raises KernelBuildError.
    """
    # Every row is computed by the same operations, so the compiler must not join two of them in one place and not in another.
    flags = ("-fopenmp", "-ffp-contract=off", *isa_flags)
    library = kernel_build.load_library(SOURCE, "quantised weights", capability, flags)
    sizes = (ctypes.c_int64, ctypes.c_int64)
    addresses = (ctypes.c_void_p, ctypes.c_void_p)
    library.block_pack.argtypes = (ctypes.c_int, ctypes.c_void_p, *sizes, ctypes.c_int, *addresses, ctypes.c_int)
    library.block_multiply.argtypes = (ctypes.c_int, ctypes.c_void_p, *addresses, ctypes.c_int64, ctypes.c_int)
    library.block_pack.restype = library.block_multiply.restype = None
    return library
