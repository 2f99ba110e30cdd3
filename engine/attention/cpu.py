"""Paged attention by the C++ kernel of paged_cpu.cpp.

Builds it once per machine, if there is a compiler, and keeps it in the cache folder; `python -m engine.attention.cpu` does so
ahead of time. Its oracle is reference.py.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionMetadata, AttentionParams
from engine.errors import KernelBuildError
from engine.operator_build import build_operators

SOURCE = Path(__file__).with_name("paged_cpu.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAN_REPLAY_DECODES = True
CAN_REPLAY_PROMPTS = False


def load(
    device: torch.device, dtype: torch.dtype, calls: Sequence[AttentionCall], chunk_size: int
) -> tuple[AttentionBackend, str]:
    """See AttentionLoader."""
    if device.type != "cpu":
        raise KernelBuildError(f"the model is on {device}; use 'auto'")
    if dtype not in DTYPES:
        raise KernelBuildError(f"its kernel does not compute in {dtype}; use 'reference'")
    return sys.modules[__name__], f"C++ kernel (cpu), {load_kernel()}"


def load_kernel() -> str:
    """Make the kernel callable, and build it if that has not been done.

    Returns the instruction set that it was built for. Raises KernelBuildError if it cannot be built.
    """
    capability: str = torch.backends.cpu.get_cpu_capability()
    if not hasattr(torch.ops.pensieve, "paged_attention"):
        try:
            torch.ops.load_library(str(build_operators(SOURCE, "attention", capability)))
        except OSError as error:  # a cache folder that cannot be written, a library that does not fit this machine
            raise KernelBuildError(f"the attention kernel cannot be stored or loaded: {error}") from error
    return capability


def write_kv(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    metadata: AttentionMetadata,
) -> None:
    """See AttentionBackend."""
    torch.ops.pensieve.write_kv(k_pool, v_pool, key, value, metadata.slot_mapping)


def attend(
    query: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    metadata: AttentionMetadata,
    params: AttentionParams,
) -> torch.Tensor:
    """See AttentionBackend."""
    out: torch.Tensor = torch.ops.pensieve.paged_attention(
        query,
        k_pool,
        v_pool,
        metadata.segments,
        metadata.block_tables,
        params.scaling,
        params.sliding_window or 0,
        params.softcap or 0.0,
        params.sinks,
    )
    return out


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(f"attention kernel for {load_kernel()}: ready")
    except KernelBuildError as error:
        print(f"no attention kernel, torch's operations will be used: {error}", file=sys.stderr)
