"""Paged attention by FlashInfer, which is optional, on a GPU.

It plans each batch on the host, for all layers that differ in nothing but their KV. Batches of decodes, which CUDA
graphs replay without a plan, and features that it lacks (sinks) go to the Triton kernel, which also writes.

A plan lives in the buffers of the wrapper that made it. So this backend has state and is an object, one for each engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.attention import triton_paged
from engine.attention.device_health import check_device
from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionMetadata, AttentionParams, to_device
from engine.errors import KernelBuildError

DTYPES = (torch.bfloat16, torch.float16)
# Features of a head that FlashInfer has kernels for on every GPU that it knows.
HEAD_DIMS = (64, 128, 256)
# What its documentation recommends for partial results of contexts that it splits.
MIN_WORKSPACE_BYTES = 128 << 20
# It splits only while that gives no more tiles than two for each processor, of at most so many rows.
TILES_PER_PROCESSOR, MAX_TILE_ROWS = 2, 128


@dataclass(frozen=True, slots=True)
class _PlanKey:
    """What belongs to a plan besides the batch. window_left: tokens seen before the row's own; -1 = all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int
    dtype: torch.dtype
    scaling: float
    window_left: int
    softcap: float | None


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """A step as FlashInfer takes it: a request for each segment; shared by all layers. All int32.

    qo_indptr, kv_indptr: [num_segments + 1], where the rows and the blocks of each begin; in host memory, because it
        plans there.
    last_block_len: [num_segments], in host memory.
    block_ids: [kv_indptr[-1]], on the device.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    block_ids: torch.Tensor
    last_block_len: torch.Tensor


def load(
    device: torch.device, dtype: torch.dtype, calls: Sequence[AttentionCall], chunk_size: int
) -> tuple[AttentionBackend, str]:
    """See AttentionLoader. Needs Triton's kernel, too: it computes the decodes."""
    triton_paged.load(device, dtype, calls, chunk_size)
    return FlashInferAttention(), f"FlashInfer (flashinfer), {load_kernel(device, calls, chunk_size, dtype)}"


def load_kernel(device: torch.device, calls: Sequence[AttentionCall], chunk_size: int, dtype: torch.dtype) -> str:
    """Check that it can serve these calls, by a toy of each kind; return what it is.

    This compiles kernels, which takes minutes once. Raises KernelBuildError.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise KernelBuildError(f"FlashInfer needs a CUDA device of compute capability 8.0 or more, not {device}")
    if dtype not in DTYPES:
        raise KernelBuildError(f"FlashInfer does not compute in {dtype}; use 'triton'")
    for layer in (call.shape for call in calls):
        if layer.k_dim != layer.v_dim or layer.k_dim not in HEAD_DIMS:
            raise KernelBuildError(
                f"FlashInfer does not take heads of {layer.k_dim} (K) and {layer.v_dim} (V) features; they have to be equal, "
                f"and one of {', '.join(map(str, HEAD_DIMS))}; use 'triton'"
            )
    try:
        import flashinfer
    except Exception as error:  # not only ImportError: it also looks at the versions of what it needs
        raise KernelBuildError(
            f"flashinfer cannot be imported ({error}); pip install 'pensieve-ray[flashinfer]', or use 'triton'"
        ) from error
    try:
        for call in {call.kind: call for call in calls}.values():
            _attend_over_toy(device, call, chunk_size, dtype)
    except Exception as error:  # whatever its compiler, the driver and torch raise
        check_device(device)
        reason = str(error).strip().splitlines() or [""]
        raise KernelBuildError(
            f"flashinfer {flashinfer.__version__} cannot run here: {type(error).__name__}: {reason[0]}; it compiles its "
            "kernels, which takes the nvcc of a CUDA toolkit, unless flashinfer-jit-cache is installed; or use 'triton'"
        ) from error
    return f"flashinfer {flashinfer.__version__}"


class FlashInferAttention:
    """See AttentionBackend. For one thread and one stream at a time."""

    CAN_REPLAY_DECODES = True
    CAN_REPLAY_PROMPTS = False

    def __init__(self) -> None:
        self._plans: dict[_PlanKey, _Plan] = {}
        # Shared by all plans: what one call leaves in it, none reads.
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def write_kv(
        self,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        triton_paged.write_kv(k_pool, v_pool, key, value, metadata)

    def attend(
        self,
        query: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        metadata: AttentionMetadata,
        params: AttentionParams,
    ) -> torch.Tensor:
        if metadata.is_decode_batch or params.sinks is not None:
            return triton_paged.attend(query, k_pool, v_pool, metadata, params)
        batch: _Batch | None = metadata.derived.get(_Batch)
        if batch is None:
            batch = metadata.derived[_Batch] = _make_batch(metadata)
        key = _PlanKey(
            num_heads=query.shape[0],
            num_kv_heads=k_pool.shape[1],
            head_dim=k_pool.shape[3],
            chunk_size=metadata.chunk_size,
            dtype=query.dtype,
            scaling=params.scaling,
            # Their window is the tokens before the row's own, ours includes that.
            window_left=-1 if params.sliding_window is None else params.sliding_window - 1,
            softcap=params.softcap,
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _Plan(key, self._workspace_for(key, query.device))
        return plan.run(batch, query, k_pool, v_pool)

    def _workspace_for(self, key: _PlanKey, device: torch.device) -> torch.Tensor:
        """A larger one where the calls have more heads; the plans before keep theirs."""
        num_bytes = max(MIN_WORKSPACE_BYTES, _partial_bytes(key, triton_paged.count_processors(device)))
        if len(self._workspace) < num_bytes:
            self._workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._workspace


class _Plan:
    """A wrapper of FlashInfer, and the batch that it is planned for."""

    def __init__(self, key: _PlanKey, workspace: torch.Tensor) -> None:
        self._key = key
        self._wrapper = _wrapper_class()(workspace, "HND")
        self._batch: _Batch | None = None
        self._copied: torch.cuda.Event | None = None

    def run(self, batch: _Batch, query: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor) -> torch.Tensor:
        if self._batch is not batch:
            self._make(batch, query.device)
        # It copies whole rows of heads; most models hand over what is contiguous this way.
        rows = query.transpose(0, 1).contiguous()
        out: torch.Tensor = self._wrapper.run(rows, (k_pool, v_pool), out=torch.empty_like(rows))
        return out

    def _make(self, batch: _Batch, device: torch.device) -> None:
        self._batch = None
        if self._copied is not None:
            # A plan is written to pinned memory of the wrapper and copied from there in the current stream, and nothing in
            # FlashInfer waits: the last plan's copy may still be reading. What it copied to is safe, by the stream's order.
            self._copied.synchronize()
        key = self._key
        self._wrapper.plan(
            batch.qo_indptr,
            batch.kv_indptr,
            batch.block_ids,
            batch.last_block_len,
            key.num_heads,
            key.num_kv_heads,
            key.head_dim,
            key.chunk_size,
            causal=True,
            sm_scale=key.scaling,
            window_left=key.window_left,
            logits_soft_cap=key.softcap,
            q_data_type=key.dtype,
            kv_data_type=key.dtype,
        )
        self._copied = _record_event(device)
        self._batch = batch


def _make_batch(metadata: AttentionMetadata) -> _Batch:
    segments = metadata.segments_on_host()
    num_blocks = -(-segments[:, 2] // metadata.chunk_size)
    kv_indptr = _begins(num_blocks)
    # Of the tables' blocks those that count, found by their places in the flattened tables, which are on the device.
    first_places = segments[:, 3].astype(np.int64) * metadata.block_tables.shape[1]
    places = np.arange(kv_indptr[-1]) + np.repeat(first_places - kv_indptr[:-1], num_blocks)
    block_ids = metadata.block_tables.take(to_device(torch.from_numpy(places), metadata.block_tables.device))
    last_block_len = segments[:, 2] - (num_blocks - 1) * metadata.chunk_size
    return _Batch(
        torch.from_numpy(_begins(segments[:, 1])),
        torch.from_numpy(kv_indptr),
        block_ids,
        torch.from_numpy(last_block_len.astype(np.int32)),
    )


def _begins(counts: np.ndarray) -> np.ndarray:
    """Where each begins if they lie one behind the other, and the end of all."""
    return np.concatenate([[0], counts.cumsum()]).astype(np.int32)


def _partial_bytes(key: _PlanKey, num_processors: int) -> int:
    """The most that the partial results of one call take: float32, and one more for each row."""
    num_tiles = TILES_PER_PROCESSOR * num_processors // key.num_kv_heads
    return num_tiles * MAX_TILE_ROWS * key.num_heads * (key.head_dim + 1) * 4


def _attend_over_toy(device: torch.device, call: AttentionCall, chunk_size: int, dtype: torch.dtype) -> None:
    """One row that attends to itself. Waits for the device."""
    layer = call.shape
    pools = torch.zeros(2, 1, layer.num_kv_heads, chunk_size, layer.k_dim, dtype=dtype, device=device)
    segments = torch.tensor([[0, 1, 1, 0]], dtype=torch.int32, device=device)
    tables = torch.zeros(1, 1, dtype=torch.int32, device=device)
    metadata = AttentionMetadata(torch.zeros(1, dtype=torch.long, device=device), segments, tables, chunk_size)
    query = torch.zeros(call.num_heads, 1, layer.k_dim, dtype=dtype, device=device)
    FlashInferAttention().attend(query, pools[0], pools[1], metadata, call.params).cpu()


def _record_event(device: torch.device) -> torch.cuda.Event:
    """After all that is in the current stream by now."""
    return torch.cuda.current_stream(device).record_event()


def _wrapper_class() -> Any:
    """Not imported above: it is optional, and slow to import."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    return BatchPrefillWithPagedKVCacheWrapper
