"""What attention needs of a step, and the protocol of its backends.

Which rows of the ragged batch belong together, and where their KV is written and read: built once per step, shared by
all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
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
class AttentionMetadata:
    """One ragged batch of query segments. All tensors are on the device.

    slot_mapping: int64 [num_tokens], the slot (block_id * chunk_size + offset) that each row's K and V are written to.
    segments: int32 [num_segments, 4]: first row, query_len, context_len, row of `block_tables`. Rows [row, row +
        query_len) are consecutive positions, the last of which attends to `context_len` tokens.
    block_tables: int32 [num_tables, capacity]; of a table the first ceil(context_len / chunk_size) block ids count.
    host_segments: `segments` in host memory; without it a backend that plans on the host waits for the device to copy them.
    is_decode_batch: every segment is one row, or no row if it pads the batch (its slot is then -1), now and whenever
        the tensors are refilled. What a backend launches then depends on their shapes alone, so that a CUDA graph of
        it may be replayed on new contents. For backends with CAN_REPLAY_DECODES.
    is_refilled: as is_decode_batch, but for segments of any lengths: rows and segments are as many as the tensors have
        room for, or fewer. The last segment is always padding, without a row. For backends with CAN_REPLAY_PROMPTS.
    derived: what a backend made of the above, for all layers. Of a batch that is refilled, each has a method
        `refill(host_segments)`, which is called before a replay and puts its work into the current stream.
    """

    slot_mapping: torch.Tensor
    segments: torch.Tensor
    block_tables: torch.Tensor
    chunk_size: int
    host_segments: np.ndarray | None = None
    is_decode_batch: bool = False
    is_refilled: bool = False
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def segments_on_host(self) -> np.ndarray:
        """For a backend that plans on the host; waits for the device where they are not there yet."""
        return self.segments.cpu().numpy() if self.host_segments is None else self.host_segments


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a model passes with each call.

    sliding_window: tokens seen, itself included; None = all.
    softcap: logits are squeezed into (-softcap, softcap).
    sinks: [num_heads] logits of a virtual key without value.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """What a model's attention call is like.

    shape: of K and V.
    num_heads: query heads (those of this rank).
    """

    shape: LayerShape
    num_heads: int
    params: AttentionParams

    @property
    def kind(self) -> tuple[LayerShape, int, float, int | None, float | None]:
        """Equal for calls that differ in sinks at most."""
        return self.shape, self.num_heads, self.params.scaling, self.params.sliding_window, self.params.softcap


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor in host memory, copied in the current stream of the device without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps pinned memory until copies from it are done


class AttentionBackend(Protocol):
    """One implementation of paged attention: a module, or an object if it keeps state between steps.

    CAN_REPLAY_DECODES: see AttentionMetadata.is_decode_batch.
    CAN_REPLAY_PROMPTS: see AttentionMetadata.is_refilled.
    """

    CAN_REPLAY_DECODES: bool
    CAN_REPLAY_PROMPTS: bool

    def write_kv(
        self,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        """Write this step's K and V.

        k_pool, v_pool: [num_blocks, num_kv_heads, chunk_size, dim].
        key, value: [num_kv_heads, num_tokens, dim].
        """
        ...

    def attend(
        self,
        query: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        metadata: AttentionMetadata,
        params: AttentionParams,
    ) -> torch.Tensor:
        """Compute the attention of every segment over its context, all of whose KV is in the pools.

        query: [num_heads, num_tokens, k_dim].
        Returns [num_tokens, num_heads, v_dim].
        """
        ...


class AttentionLoader(Protocol):
    """A module of the registry."""

    def load(
        self, device: torch.device, dtype: torch.dtype, calls: Sequence[AttentionCall], chunk_size: int
    ) -> tuple[AttentionBackend, str]:
        """Return the backend and what the log says of it.

        calls: the model's attention calls; none = whatever comes.
        chunk_size: tokens of a block.
        Raises KernelBuildError, which names the remedy, if it cannot serve such a model here.
        """
        ...
