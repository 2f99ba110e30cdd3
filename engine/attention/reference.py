"""Paged attention in plain torch operations, the oracle of every other backend.

It also runs if no kernel can be built. Clear before fast: K and V of a segment are gathered, then torch's own attention runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionMetadata, AttentionParams

CAN_REPLAY_DECODES = False
CAN_REPLAY_PROMPTS = False


def load(
    device: torch.device, dtype: torch.dtype, calls: Sequence[AttentionCall], chunk_size: int
) -> tuple[AttentionBackend, str]:
    """See AttentionLoader. Serves every model on every device."""
    return sys.modules[__name__], "torch's operations (reference)"


def write_kv(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    metadata: AttentionMetadata,
) -> None:
    """See AttentionBackend."""
    block_ids = torch.div(metadata.slot_mapping, metadata.chunk_size, rounding_mode="floor")
    offsets = metadata.slot_mapping % metadata.chunk_size
    k_pool[block_ids, :, offsets] = key.transpose(0, 1)
    v_pool[block_ids, :, offsets] = value.transpose(0, 1)


def attend(
    query: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    metadata: AttentionMetadata,
    params: AttentionParams,
) -> torch.Tensor:
    """See AttentionBackend."""
    num_heads, num_tokens, _ = query.shape
    out = query.new_empty(num_tokens, num_heads, v_pool.shape[-1])
    for row, query_len, context_len, table_row in metadata.segments.tolist():
        rows = slice(row, row + query_len)
        # Tokens before the window can be skipped in the gather: no row of the segment attends to them.
        first_block = 0
        if params.sliding_window is not None:
            first_seen = max(0, context_len - query_len - params.sliding_window + 1)
            first_block = first_seen // metadata.chunk_size
        num_blocks = -(-context_len // metadata.chunk_size)
        block_ids = metadata.block_tables[table_row, first_block:num_blocks]
        length = context_len - first_block * metadata.chunk_size
        k = _gather(k_pool, block_ids, length)
        v = _gather(v_pool, block_ids, length)
        out[rows] = attend_dense(query[:, rows], k, v, params).transpose(0, 1)
    return out


def _gather(pool: torch.Tensor, block_ids: torch.Tensor, length: int) -> torch.Tensor:
    """[num_kv_heads, length, dim] of the blocks, in order."""
    blocks = pool[block_ids]
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length]


def attend_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """Attention of the last query_len positions of a sequence over all of it.

    q: [num_heads, query_len, k_dim].
    k, v: [num_kv_heads, kv_len, dim].
    Returns [num_heads, query_len, v_dim].
    """
    num_heads, query_len, _ = q.shape
    num_kv_heads, kv_len, _ = k.shape
    mask = None
    if query_len > 1 or (params.sliding_window is not None and kv_len > params.sliding_window):
        q_positions = torch.arange(kv_len - query_len, kv_len, device=q.device)[:, None]
        k_positions = torch.arange(kv_len, device=q.device)[None, :]
        mask = k_positions <= q_positions
        if params.sliding_window is not None:
            mask &= k_positions > q_positions - params.sliding_window
    if params.softcap is None and params.sinks is None:
        return F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=mask,
            scale=params.scaling,
            enable_gqa=num_heads != num_kv_heads,
        )[0]
    group = num_heads // num_kv_heads
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    weights = (q @ k.transpose(-1, -2)).float() * params.scaling
    if params.softcap is not None:
        weights = torch.tanh(weights / params.softcap) * params.softcap
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf"))
    if params.sinks is not None:
        sinks = params.sinks.float().view(-1, 1, 1).expand(-1, query_len, 1)
        weights = torch.cat([weights, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = weights.softmax(-1)
    return weights.to(v.dtype) @ v
