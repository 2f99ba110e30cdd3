"""Attention of first prompts: segments whose whole context is computed in the same step.

Their K and V lie contiguous in the tensors of the step, so that torch's contiguous attention (FlashAttention, which
reads no block table) serves them faster than a paged kernel does. The other segments of the step stay with the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.attention.protocol import AttentionBackend, AttentionMetadata, AttentionParams

# Shorter ones are not worth a call of their own.
MIN_PROMPT_LEN = 512
# Without cuDNN, which is faster on Hopper once it has made a plan, and makes one for each length of a prompt.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class _Split:
    """A batch without its first prompts.

    rows: of each first prompt, in the step.
    rest: the batch, in which the first prompts have no rows on the host.
    """

    rows: tuple[slice, ...]
    rest: AttentionMetadata
    num_rest_rows: int


def attend(
    backend: AttentionBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    metadata: AttentionMetadata,
    params: AttentionParams,
) -> torch.Tensor:
    """The attention of a step, with first prompts left to torch if the backend allows that.

    backend: SKIPS_EMPTY_SEGMENTS says whether it allows it. query: [num_heads, num_tokens, k_dim]; key, value:
    [num_kv_heads, num_tokens, dim], of the step's own tokens. pools: of the layer, with these written. Returns [num_tokens,
    num_heads, v_dim]. float32 stays with the backend: there a prompt computed at once and one computed in two steps are to
    be rounded alike.
    """
    split = None
    if backend.SKIPS_EMPTY_SEGMENTS and _can_be_dense(query, value, metadata, params):
        split = _split_for(metadata, params.sliding_window)
    if split is None or not split.rows:
        return backend.attend(query, *pools, metadata, params)
    if split.num_rest_rows:
        out = backend.attend(query, *pools, split.rest, params)
    else:
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    with sdpa_kernel(KERNELS):
        for rows in split.rows:
            dense = F.scaled_dot_product_attention(
                query[None, :, rows],
                key[None, :, rows],
                value[None, :, rows],
                is_causal=True,
                scale=params.scaling,
                enable_gqa=query.shape[0] != key.shape[0],
            )
            out[rows] = dense[0].transpose(0, 1)
    return out


def _can_be_dense(
    query: torch.Tensor, value: torch.Tensor, metadata: AttentionMetadata, params: AttentionParams
) -> bool:
    return (
        metadata.host_segments is not None
        and not metadata.is_decode_batch
        and query.dtype != torch.float32
        and query.shape[2] == value.shape[2]
        and params.softcap is None
        and params.sinks is None
    )


def _split_for(metadata: AttentionMetadata, window: int | None) -> _Split:
    """Layers of one window share it."""
    key = (_Split, window)
    split: _Split | None = metadata.derived.get(key)
    if split is None:
        assert metadata.host_segments is not None
        host = metadata.host_segments.copy()
        is_first = (host[:, 1] == host[:, 2]) & (host[:, 1] >= MIN_PROMPT_LEN)
        if window is not None:
            is_first &= host[:, 1] <= window
        rows = _slices(host[is_first, :2].tolist())
        host[is_first, 1] = 0
        rest = replace(metadata, host_segments=host, derived={})
        split = metadata.derived[key] = _Split(rows, rest, int(host[:, 1].sum()))
    return split


def _slices(begins_and_lengths: Sequence[Sequence[int]]) -> tuple[slice, ...]:
    return tuple(slice(first, first + length) for first, length in begins_and_lengths)
