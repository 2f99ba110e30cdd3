"""Paged attention by torch's own FlashAttention (torch.nn.attention.varlen), on a GPU. It takes pages of multiples of 256
tokens, which is eight times the usual chunk: for comparison, and where chunks may be that large. Batches of decodes, which
CUDA graphs replay while what it launches depends on the longest context, and what it does not know (softcap, sinks) go to the
Triton kernel, which also writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.attention import triton_paged
from engine.attention.metadata import AttentionMetadata, AttentionParams, LayerShape, to_device
from engine.errors import KernelBuildError

CAN_REPLAY_DECODES = True
SKIPS_EMPTY_SEGMENTS = False
DTYPES = (torch.bfloat16, torch.float16)
# What the FlashAttention 2 in torch demands of a page, and of a head.
PAGE_MULTIPLE, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 256, 8, 256

write_kv = triton_paged.write_kv


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step as varlen_attn wants it; shared by all layers. cu_seq_*: int32 [num_segments + 1]. seqused_k: int32
    [num_segments]. block_table: int32 [num_segments, capacity]."""

    cu_seq_q: torch.Tensor
    cu_seq_k: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    max_q: int
    max_k: int


def load_kernel(device: torch.device, layers: Sequence[LayerShape], chunk_size: int) -> str:
    """Make sure that it can serve these layers. Returns what it is; raises KernelBuildError."""
    try:
        parameters = inspect.signature(_varlen_attn()).parameters
    except ImportError as error:
        raise KernelBuildError(f"torch {torch.__version__} has no torch.nn.attention.varlen ({error})") from error
    missing = {"block_table", "seqused_k", "enable_gqa", "num_splits", "scale", "window_size"} - parameters.keys()
    if missing:
        raise KernelBuildError(f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(missing))}")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise KernelBuildError(f"FlashAttention needs a CUDA device of compute capability 8.0 or more, not {device}")
    if chunk_size % PAGE_MULTIPLE:
        raise KernelBuildError(f"FlashAttention takes pages of {PAGE_MULTIPLE} tokens; set chunk_size to that or more")
    for layer in layers:
        if layer.k_dim != layer.v_dim or layer.k_dim % HEAD_DIM_MULTIPLE or layer.k_dim > MAX_HEAD_DIM:
            raise KernelBuildError(
                f"FlashAttention does not take heads of {layer.k_dim} (K) and {layer.v_dim} (V) features; they have to be "
                f"equal, a multiple of {HEAD_DIM_MULTIPLE}, and {MAX_HEAD_DIM} at most"
            )
    return f"torch {torch.__version__}"


def attend(
    query: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    metadata: AttentionMetadata,
    params: AttentionParams,
) -> torch.Tensor:
    """See AttentionBackend."""
    if metadata.is_decode_batch or params.softcap is not None or params.sinks is not None:
        return triton_paged.attend(query, k_pool, v_pool, metadata, params)
    batch: _Batch | None = metadata.derived.get(_Batch)
    if batch is None:
        batch = metadata.derived[_Batch] = _make_batch(metadata)
    out: torch.Tensor = _varlen_attn()(
        query.transpose(0, 1),
        k_pool.transpose(1, 2),
        v_pool.transpose(1, 2),
        batch.cu_seq_q,
        batch.cu_seq_k,
        batch.max_q,
        batch.max_k,
        scale=params.scaling,
        # Their window is the tokens before the row's own, ours includes that.
        window_size=(-1 if params.sliding_window is None else params.sliding_window - 1, 0),
        enable_gqa=query.shape[0] != k_pool.shape[1],
        seqused_k=batch.seqused_k,
        block_table=batch.block_table,
        # Splits of ragged paged batches were seen to be wrong elsewhere (Dao-AILab/flash-attention#1217).
        num_splits=1,
    )
    return out


def _make_batch(metadata: AttentionMetadata) -> _Batch:
    segments = metadata.segments_on_host()
    ends = [np.concatenate([[0], segments[:, column].cumsum()]).astype(np.int32) for column in (1, 2)]
    cu_seqs = to_device(torch.from_numpy(np.stack(ends)), metadata.segments.device)
    return _Batch(
        cu_seqs[0],
        cu_seqs[1],
        metadata.segments[:, 2].contiguous(),
        metadata.block_tables[metadata.segments[:, 3].long()],
        int(segments[:, 1].max()),
        int(segments[:, 2].max()),
    )


def _varlen_attn() -> Callable[..., Any]:
    """Not imported above: torch has it from 2.10 on, and other backends do without."""
    from torch.nn.attention import varlen

    function: Callable[..., Any] = varlen.varlen_attn
    return function
