"""Compiles the kernels for GPUs on a machine without one.

The host's code runs on CPU tensors, and instead of launching, each launch is compiled with the types and constants that
it came with. Run by test_triton.py in a process of its own, in which Triton does not interpret.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.attention import triton_paged
from engine.attention.protocol import AttentionMetadata, AttentionParams, LayerShape
from engine.core.plan import BlockCopy
from engine.core.tier_table import GPU
from engine.executor.tiers import cold_copy_kernel
from engine.executor.tiers.cold_format import ColdFormat
from engine.executor.tiers.kv_store import ColdStore, KVStore

CAPABILITIES = {80: 163 * 1024, 90: 227 * 1024}  # shared memory of a block
# Stores and loads; a few on Ampere cost nothing that shows.
MAX_SPILLED_BYTES = {80: 64, 90: 0}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


class Compiler:
    """Stands in for a kernel: kernel[grid](...) compiles."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self._kernel = kernel
        self._capability = capability

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: object, **kwargs: Any) -> None:
        names = self._kernel.arg_names
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(names):
            value = values[name]
            if value is None or name.isupper():
                signature[name], constants[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if (
                    isinstance(value, int)
                    and value % 16 == 0
                    and name not in ("num_tokens", "table_stride", "num_pairs", "num_copies")
                ):
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self._kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self._capability, 32), options=options)
        shared = compiled.metadata.shared
        assert shared <= CAPABILITIES[self._capability], f"{shared} bytes of shared memory"
        if self._capability in MAX_SPILLED_BYTES and self._is_common(values):
            spilled = spilled_bytes(compiled.asm["ptx"], self._capability)
            assert spilled <= MAX_SPILLED_BYTES[self._capability], f"{spilled} bytes of registers spilled"
            print(f"{spilled} bytes of registers spilled")
        print(f"{self._kernel.fn.__name__} for {self._capability}: compiled, {shared} bytes of shared memory")

    def _is_common(self, values: dict[str, Any]) -> bool:
        """Attention in half precision as most models have it."""
        return "query" in values and values["query"].dtype == torch.bfloat16 and values["K_DIM"] == 128


def spilled_bytes(ptx: str, capability: int) -> int:
    """What does not fit the registers of a thread, by the assembler that triton brings along: stores and loads."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = f"-arch=sm_{capability}" + ("a" if capability >= 90 else "")
        command = [triton.knobs.nvidia.ptxas.path, "-v", arch, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))


def attend(dtype: torch.dtype, lengths: list[int], dim: int, chunk_size: int, params: AttentionParams) -> None:
    """Compiles attention for segments of so many rows each, after 1000 tokens."""
    num_tokens = sum(lengths)
    segments = torch.tensor([[0, n, n + 1000, i] for i, n in enumerate(lengths)], dtype=torch.int32)
    tables = torch.zeros(len(lengths), 64, dtype=torch.int32)
    slots = torch.zeros(num_tokens, dtype=torch.long)
    metadata = AttentionMetadata(slots, segments, tables, chunk_size, host_segments=segments.numpy())
    pool = torch.zeros(1, 4, chunk_size, dim, dtype=dtype)
    query, key = (torch.zeros(num_tokens, heads, dim, dtype=dtype).transpose(0, 1) for heads in (16, 4))
    triton_paged.write_kv(pool, pool, key, key, metadata)
    triton_paged.attend(query, pool, pool, metadata, params)


def convert_blocks(kind: str, dtype: torch.dtype) -> None:
    """Compiles the kernels of the cold tiers."""
    layers = [LayerShape(2, 128, 128)]
    gpu = KVStore(layers, num_blocks=1, chunk_size=32, dtype=dtype, device=torch.device("cpu"))
    cold = ColdStore(ColdFormat(kind, layers, 32, dtype), num_blocks=1)
    everything = slice(0, gpu.storage.shape[1])
    copy = [BlockCopy(GPU, 0, GPU, 0)]
    cold_copy_kernel.ColdEncoder(cold.format).copy(cold.storage, gpu.storage, copy, everything)
    cold_copy_kernel.ColdDecoder(gpu, cold.format).copy(gpu.storage, cold.storage, copy, everything)


def _given(num_bytes: int, _: torch.device) -> int:
    return num_bytes


def main() -> None:
    kernels = {name: getattr(triton_paged, name) for name in ("_write_kernel", "_attend_kernel", "_combine_kernel")}
    converting = {name: getattr(cold_copy_kernel, name) for name in ("_encode_kernel", "_decode_kernel")}
    for capability, shared_memory in CAPABILITIES.items():
        triton_paged._shared_memory = partial(_given, shared_memory)
        for name, kernel in kernels.items():
            setattr(triton_paged, name, Compiler(kernel, capability))
        for name, kernel in converting.items():
            setattr(cold_copy_kernel, name, Compiler(kernel, capability))
        for kind in ("fp8", "int8", "int4"):
            convert_blocks(kind, torch.bfloat16)
        attend(torch.bfloat16, [1, 1], 128, 32, AttentionParams(0.1))
        attend(torch.bfloat16, [100], 128, 32, AttentionParams(0.1))
        attend(torch.bfloat16, [100, 1], 128, 32, AttentionParams(0.1))
        attend(torch.bfloat16, [100], 256, 5, AttentionParams(0.1, 512, 30.0, torch.zeros(16)))
    attend(torch.float32, [7], 80, 32, AttentionParams(0.1))


if __name__ == "__main__":
    main()
