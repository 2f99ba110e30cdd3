"""What attention has to know of a step: which rows of the ragged batch belong together, where their KV is written and read.
Built once per step and shared by all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV of one attention call: heads (those of this rank), features per head of K and of V."""

    num_kv_heads: int
    k_dim: int
    v_dim: int

    @property
    def numel_per_token(self) -> int:
        return self.num_kv_heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True, slots=True)
class AttentionSegment:
    """Rows [row, row + query_len) of the batch are consecutive positions, the last of which attends to `context_len`
    tokens. block_ids: int64 [ceil(context_len / chunk_size)], on the device."""

    row: int
    query_len: int
    context_len: int
    block_ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """slot_mapping: int64 [num_tokens], on the device: the slot (block_id * chunk_size + offset) that each row's K and V
    are written to."""

    slot_mapping: torch.Tensor
    segments: tuple[AttentionSegment, ...]
    chunk_size: int


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a model hands over with each call. sliding_window: tokens seen, itself included; None = all. softcap: logits are
    squeezed into (-softcap, softcap). sinks: [num_heads] logits of a virtual key without value."""

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
