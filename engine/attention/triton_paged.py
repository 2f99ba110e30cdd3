# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that Python knows.
"""Multi-token paged attention on a GPU, in Triton (paper section 4.4.1).

One launch serves a ragged batch of prefills and decodes, a second small one combines the parts of contexts that were
split. Its oracle is reference.py. With TRITON_INTERPRET=1 in the environment before triton is imported it runs on a
CPU, for tests: correct and very slow, and wrong in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

from engine.attention.device_health import check_device
from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionMetadata, AttentionParams, to_device
from engine.attention.tiling import (
    MAX_SPLITS,
    SPLIT_STEP,
    RefilledTiling,
    Tiling,
    tile_decode_batch,
    tile_segments,
)
from engine.errors import KernelBuildError

IS_INTERPRETED: bool = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAN_REPLAY_DECODES = True
CAN_REPLAY_PROMPTS = True

# Rows (query row x query head of one KV head) of a tile: what the matrix units take at least.
_MIN_ROWS = 16
# Rows of a tile of a batch of prompts alone.
_LONG_TILE_ROWS = 128
# Programs that fill a processor, keys that a split has at least: tiles of single rows, which wait for memory, then others,
# whose partial results are larger.
_FEW_ROWS = (4, 2 * SPLIT_STEP)
_MANY_ROWS = (2, 8 * SPLIT_STEP)
# Elements of K and V in one turn of the loop. They may be in shared memory twice, and together with the queries they have to
# fit the 99 KiB of consumer cards; float32, multiplied without the matrix units, is bound by registers.
_KV_TILE_ELEMENTS = 16 * 1024
_KV_TILE_ELEMENTS_FLOAT32 = 4 * 1024
# Of a program, in bytes: from Hopper on, tiles of prompts may have twice as many elements of K and V.
_LARGE_SHARED_MEMORY = 200 * 1024
# The table is loaded a turn ahead of K and V, these a turn ahead of their use; with two stages nothing is.
_NUM_STAGES = 3
# Rows of tiles that multiply keys that all rows see without masks, in a loop of their own; fewer wait for memory anyway.
_PLAIN_LOOP_ROWS = 64
# Rows of a long tile that a program combines from its splits, one by one.
_COMBINED_ROWS = 8
# Tokens that a program writes.
_WRITE_TOKENS = 16
_LOG2E = tl.constexpr(1.4426950408889634)
# The running maximum starts here and not at -inf: -inf minus -inf would be NaN where a row sees no key of a tile.
_LOWEST = tl.constexpr(-1e30)


def load(
    device: torch.device, dtype: torch.dtype, calls: Sequence[AttentionCall], chunk_size: int
) -> tuple[AttentionBackend, str]:
    """See AttentionLoader."""
    if device.type != "cuda" and not IS_INTERPRETED:
        raise KernelBuildError(
            f"the model is on {device} and not on a CUDA device; use 'auto', or, to test the kernel at a thousandth of its "
            "speed, set TRITON_INTERPRET=1 in the environment"
        )
    if dtype not in DTYPES:
        raise KernelBuildError(f"its kernel does not compute in {dtype}; use 'reference'")
    return sys.modules[__name__], f"Triton kernel (triton), {load_kernel(device)}"


def load_kernel(device: torch.device) -> str:
    """Launch everything once on a toy, which compiles it; return what runs it.

    Raises KernelBuildError if that fails: no C compiler for triton's launcher, a device that triton does not know.
    """
    dtype = torch.float32
    pools = [torch.zeros(5, 1, SPLIT_STEP, 16, dtype=dtype, device=device) for _ in range(2)]
    tables = torch.arange(5, dtype=torch.int32, device=device)[None]
    segments = torch.tensor([[0, 1, 5 * SPLIT_STEP, 0]], dtype=torch.int32, device=device)
    metadata = AttentionMetadata(torch.tensor([3], device=device), segments, tables, SPLIT_STEP)
    row = torch.ones(1, 1, 16, dtype=dtype, device=device)
    try:
        write_kv(pools[0], pools[1], row, row, metadata)
        attend(row, pools[0], pools[1], metadata, AttentionParams(1.0)).cpu()
    except Exception as error:  # whatever triton, the compilers behind it and the driver raise
        check_device(device)
        raise KernelBuildError(f"triton {triton.__version__} cannot run here: {error!r}") from error
    return "interpreted, for tests" if IS_INTERPRETED else f"triton {triton.__version__}"


def write_kv(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    metadata: AttentionMetadata,
) -> None:
    """See AttentionBackend. A slot of -1 is not written."""
    num_kv_heads, num_tokens, k_dim = key.shape
    v_dim = value.shape[2]
    _check_pools(k_pool, v_pool)
    if key.shape != (k_pool.shape[1], num_tokens, k_pool.shape[3]) or value.shape[2] != v_pool.shape[3]:
        raise ValueError("key and value must be [num_kv_heads, num_tokens, dim] of their pools")
    key, value = _with_dense_rows(key), _with_dense_rows(value)
    with torch.cuda.device_of(key):  # triton launches on the current device
        _write_kernel[(-(-num_tokens // _WRITE_TOKENS), num_kv_heads)](
            k_pool,
            v_pool,
            key,
            value,
            metadata.slot_mapping,
            num_tokens,
            k_pool.stride(0),
            v_pool.stride(0),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            CHUNK_SIZE=metadata.chunk_size,
            K_DIM=k_dim,
            V_DIM=v_dim,
            BLOCK_T=_WRITE_TOKENS,
            BLOCK_K=_power_of_two(k_dim),
            BLOCK_V=_power_of_two(v_dim),
        )


def attend(
    query: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    metadata: AttentionMetadata,
    params: AttentionParams,
) -> torch.Tensor:
    """See AttentionBackend. Rows that belong to no segment are not written."""
    num_heads, num_tokens, k_dim = query.shape
    num_kv_heads, v_dim = k_pool.shape[1], v_pool.shape[3]
    _check_pools(k_pool, v_pool)
    if k_dim != k_pool.shape[3] or num_heads % num_kv_heads != 0:
        raise ValueError("query must be [num_heads, num_tokens, k_dim], num_heads a multiple of num_kv_heads")
    if not query.dtype == k_pool.dtype == v_pool.dtype:
        raise ValueError("query and pools must have the same dtype")
    query = _with_dense_rows(query)
    block_k, block_v = max(16, _power_of_two(k_dim)), max(16, _power_of_two(v_dim))
    group = num_heads // num_kv_heads
    max_rows = _rows_of_a_tile(query.dtype, max(block_k, block_v), group * _shortest_segment(metadata))
    sharers = -(-group // max_rows)  # tiles that the heads of a KV head are spread over
    tile_heads = -(-group // sharers)
    num_head_tiles = num_kv_heads * sharers
    tiling = _tiling(metadata, max_rows // tile_heads, num_head_tiles)
    block_m = max(_MIN_ROWS, _power_of_two(tiling.tile_tokens * tile_heads))

    out = query.new_empty(num_tokens, num_heads, v_dim)
    partial_shape = (tiling.num_partials, num_head_tiles, block_m)
    partial_lse = torch.empty(partial_shape, dtype=torch.float32, device=query.device)
    partial_out = torch.empty(*partial_shape, v_dim, dtype=torch.float32, device=query.device)
    ranges = {"WINDOW": params.sliding_window or 0, "TILE_TOKENS": tiling.tile_tokens, "SPLIT_STEP": SPLIT_STEP}
    heads = {"NUM_HEADS": num_heads, "GROUP": group, "SHARERS": sharers, "TILE_HEADS": tile_heads}
    sizes = {"V_DIM": v_dim, "BLOCK_M": block_m, "BLOCK_V": block_v}
    with torch.cuda.device_of(query):
        _attend_kernel[(len(tiling.work), num_head_tiles)](
            out,
            partial_out,
            partial_lse,
            query,
            k_pool,
            v_pool,
            params.sinks,
            tiling.work,
            metadata.segments,
            metadata.block_tables,
            params.scaling,
            params.softcap or 0.0,
            query.stride(0),
            query.stride(1),
            k_pool.stride(0),
            v_pool.stride(0),
            metadata.block_tables.stride(0),
            CHUNK_SIZE=metadata.chunk_size,
            K_DIM=k_dim,
            BLOCK_N=_keys_of_a_tile(query.dtype, block_k + block_v, block_m, query.device),
            BLOCK_K=block_k,
            HAS_SOFTCAP=params.softcap is not None,
            HAS_PLAIN_LOOP=block_m >= _PLAIN_LOOP_ROWS and not params.sliding_window,
            **ranges,
            **heads,
            **sizes,
            num_warps=_warps_of_a_tile(block_m, max(block_k, block_v)),
            num_stages=_NUM_STAGES,
        )
        if tiling.num_partials > 0:
            rows = tiling.tile_tokens * tile_heads
            rows_each = 1 if rows <= _MIN_ROWS else _COMBINED_ROWS
            _combine_kernel[(len(tiling.combinations), -(-rows // rows_each), num_head_tiles)](
                out,
                partial_out,
                partial_lse,
                tiling.combinations,
                metadata.segments,
                MAX_SPLITS=_splits_combined(tiling, metadata),
                ROWS=rows_each,
                **ranges,
                **heads,
                **sizes,
                num_warps=4,
            )
    return out


def _tiling(metadata: AttentionMetadata, max_tile_tokens: int, num_head_tiles: int) -> Tiling | RefilledTiling:
    """Return the tiling, made at the first layer of a step; layers with the same heads share it.

    It is on the device, or being copied there in the current stream: waiting for it would be waiting for everything
    before it in that stream, such as KV that is swapped in.
    """
    key = (max_tile_tokens, num_head_tiles)
    tiling: Tiling | RefilledTiling | None = metadata.derived.get(key)
    if tiling is None and metadata.is_refilled:
        device = metadata.segments.device
        programs, min_split = _MANY_ROWS
        tiling = metadata.derived[key] = RefilledTiling(
            len(metadata.slot_mapping),
            len(metadata.segments),
            max_tile_tokens,
            num_head_tiles,
            programs * count_processors(device),
            min_split,
            device,
        )
    if tiling is None:
        tiling = _cut(metadata, max_tile_tokens, num_head_tiles)
        num_work = len(tiling.work)
        both = to_device(torch.cat([tiling.work, tiling.combinations]), metadata.segments.device)  # one copy
        tiling = metadata.derived[key] = replace(tiling, work=both[:num_work], combinations=both[num_work:])
    return tiling


def _cut(metadata: AttentionMetadata, max_tile_tokens: int, num_head_tiles: int) -> Tiling:
    num_processors = count_processors(metadata.segments.device)
    programs, min_split = _FEW_ROWS
    if metadata.is_decode_batch:
        return tile_decode_batch(len(metadata.segments), num_head_tiles, programs * num_processors)
    segments = metadata.segments_on_host()
    tile_tokens = min(max_tile_tokens, int(segments[:, 1].max(initial=1)))
    if tile_tokens > 1:
        # Not the longest segment: every number of rows would be compiled anew.
        tile_tokens = max_tile_tokens
        programs, min_split = _MANY_ROWS
    return tile_segments(segments, tile_tokens, num_head_tiles, programs * num_processors, min_split)


@lru_cache
def count_processors(device: torch.device) -> int:
    if device.type == "cuda":
        num_processors: int = torch.cuda.get_device_properties(device).multi_processor_count
        return num_processors
    return 8


def _rows_of_a_tile(dtype: torch.dtype, dim: int, shortest_rows: int) -> int:
    """As many as the registers hold, and as are filled.

    Half of what a tile reads of K and V comes from the second-level cache, so that twice the rows halve that traffic; in a
    batch with decodes most rows of such a tile would be empty. float32 is multiplied without the matrix units, which takes
    more registers. shortest_rows: rows of the shortest segment, over the query heads that share a KV head.
    """
    if dtype == torch.float32:
        return _MIN_ROWS
    if dim <= 128 and shortest_rows >= _LONG_TILE_ROWS:
        return _LONG_TILE_ROWS
    return 64 if dim <= 256 else 32


def _shortest_segment(metadata: AttentionMetadata) -> int:
    """Rows of the shortest segment that has any; 1 if the host does not know them."""
    if metadata.host_segments is None or metadata.is_decode_batch:
        return 1
    shortest: int | None = metadata.derived.get(_shortest_segment)
    if shortest is None:
        query_lens = metadata.host_segments[:, 1]
        shortest = int(query_lens[query_lens > 0].min(initial=2**31 - 1))
        metadata.derived[_shortest_segment] = shortest
    return shortest


def _keys_of_a_tile(dtype: torch.dtype, elements_per_key: int, rows: int, device: torch.device) -> int:
    """A power of two from 16 to 128; those of long tiles are more if K and V of two turns fit the shared memory then."""
    elements = _KV_TILE_ELEMENTS_FLOAT32 if dtype == torch.float32 else _KV_TILE_ELEMENTS
    if rows >= _LONG_TILE_ROWS and _shared_memory(device) >= _LARGE_SHARED_MEMORY:
        return min(128, max(16, _power_of_two(2 * elements // elements_per_key + 1) // 2))
    return min(64, max(16, _power_of_two(elements // elements_per_key + 1) // 2))


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type == "cuda":
        num_bytes: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        return num_bytes
    return 0


def _splits_combined(tiling: Tiling | RefilledTiling, metadata: AttentionMetadata) -> int:
    """A power of two. The exact one only for decode batches, of which there are few: each is compiled."""
    if metadata.is_decode_batch:
        return _power_of_two(tiling.num_partials // len(tiling.combinations))
    return MAX_SPLITS


def _warps_of_a_tile(rows: int, dim: int) -> int:
    """Its output lies in the registers of all of them."""
    return 8 if rows * dim >= 64 * 256 else 4


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def _with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _check_pools(k_pool: torch.Tensor, v_pool: torch.Tensor) -> None:
    for pool in (k_pool, v_pool):
        _, _, chunk_size, dim = pool.shape
        if pool.stride()[1:] != (chunk_size * dim, dim, 1):
            raise ValueError("a pool must be [num_blocks, num_kv_heads, chunk_size, dim] with its blocks contiguous")


@triton.jit(do_not_specialize=["num_tokens"])
def _write_kernel(
    k_pool,
    v_pool,
    key,
    value,
    slot_mapping,
    num_tokens,
    k_block_stride,
    v_block_stride,
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    CHUNK_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program copies K and V of BLOCK_T tokens and one KV head."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    is_written = (slot >= 0)[:, None]
    # Not of the slot itself: a quotient of -1 would be rounded one way here and the other way in the interpreter.
    slot = tl.maximum(slot, 0)
    block_id, offset = slot // CHUNK_SIZE, head * CHUNK_SIZE + slot % CHUNK_SIZE
    d = tl.arange(0, BLOCK_K)[None, :]
    mask = is_written & (d < K_DIM)
    rows = tl.load(key + head * key_head_stride + (token * key_token_stride)[:, None] + d, mask=mask)
    tl.store(k_pool + (block_id * k_block_stride + offset * K_DIM)[:, None] + d, rows, mask=mask)
    d = tl.arange(0, BLOCK_V)[None, :]
    mask = is_written & (d < V_DIM)
    rows = tl.load(value + head * value_head_stride + (token * value_token_stride)[:, None] + d, mask=mask)
    tl.store(v_pool + (block_id * v_block_stride + offset * V_DIM)[:, None] + d, rows, mask=mask)


@triton.jit
def _locate_tile(tile, segments, num_splits, TILE_TOKENS: tl.constexpr, WINDOW: tl.constexpr, SPLIT_STEP: tl.constexpr):
    """Look up an entry of the tiling.

    Returns (first row, rows, table row, position of the first row, first key, end of keys, keys of a split). Splits
    beyond the end are empty.
    """
    segment = segments + tl.load(tile) * 4
    first_token = tl.load(tile + 1)
    query_len = tl.load(segment + 1)
    num_tokens = tl.minimum(query_len - first_token, TILE_TOKENS)
    position = tl.load(segment + 2) - query_len + first_token
    end = position + num_tokens
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(position - WINDOW + 1, 0)
    split_len = tl.cdiv(tl.cdiv(end - begin, num_splits), SPLIT_STEP) * SPLIT_STEP
    return tl.load(segment) + first_token, num_tokens, tl.load(segment + 3), position, begin, end, split_len


@triton.jit
def _locate_head(head_tile, r, GROUP: tl.constexpr, SHARERS: tl.constexpr, TILE_HEADS: tl.constexpr):
    """Return (KV head, query head) of row r; rows after the KV head's last query head have none."""
    kv_head = head_tile // SHARERS
    return kv_head, kv_head * GROUP + head_tile % SHARERS * TILE_HEADS + r % TILE_HEADS


@triton.jit
def _squeeze(scores, softcap):
    """softcap * tanh(scores / softcap), by an exponential that cannot overflow."""
    e = tl.exp2(tl.abs(scores) * (-2.0 * _LOG2E / softcap))
    squeezed = softcap * (1.0 - e) / (1.0 + e)
    return tl.where(scores < 0, -squeezed, squeezed)


@triton.jit
def _add(scores, v, highest, total, acc):
    """Add values by their scores, in powers of two, to a running softmax."""
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_highest, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def _attend_kernel(
    out,
    partial_out,
    partial_lse,
    query,
    k_pool,
    v_pool,
    sinks,
    work,
    segments,
    block_tables,
    scaling,
    softcap,
    q_head_stride,
    q_token_stride,
    k_block_stride,
    v_block_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARERS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_PLAIN_LOOP: tl.constexpr,
    SPLIT_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute TILE_HEADS query heads of TILE_TOKENS rows of one segment, over one split of their context.

    Row r of the tile is head r % TILE_HEADS of token r // TILE_HEADS, so that K and V are read once for all heads
    that share them.
    """
    index, head_tile = tl.program_id(0), tl.program_id(1)
    split, num_splits = tl.load(work + index * 4 + 2), tl.load(work + index * 4 + 3)
    first_row, num_tokens, table_row, position, begin, end, split_len = _locate_tile(
        work + index * 4, segments, num_splits, TILE_TOKENS, WINDOW, SPLIT_STEP
    )
    split_begin = begin + split * split_len
    if (num_tokens <= 0) | (split_begin >= end):
        return

    r = tl.arange(0, BLOCK_M)
    token = first_row + r // TILE_HEADS
    kv_head, head = _locate_head(head_tile, r, GROUP, SHARERS, TILE_HEADS)
    is_row = (r < num_tokens * TILE_HEADS) & (head < (kv_head + 1) * GROUP)
    d_k, d_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    q_rows = query + token.to(tl.int64) * q_token_stride + head.to(tl.int64) * q_head_stride
    q = tl.load(q_rows[:, None] + d_k[None, :], mask=is_row[:, None] & (d_k < K_DIM)[None, :], other=0.0)
    last_seen = position + r // TILE_HEADS

    # In powers of two, which the hardware raises: exp(x) = exp2(x * log2(e)).
    highest = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # One condition when it is compiled, another when it runs.
    if sinks is not None:  # noqa: SIM102
        if split == 0:
            highest = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2E
            total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    k_head = k_pool + kv_head * CHUNK_SIZE * K_DIM
    v_head = v_pool + kv_head * CHUNK_SIZE * V_DIM
    table = block_tables + table_row.to(tl.int64) * table_stride
    split_end = tl.minimum(split_begin + split_len, end)
    # First the keys that every row of the tile sees: they need no masks, which take as long as half of the multiplications.
    seen_end = split_begin
    if HAS_PLAIN_LOOP:
        num_seen = tl.maximum(tl.minimum(split_end, position + 1) - split_begin, 0)
        seen_end += num_seen // BLOCK_N * BLOCK_N
        for start in range(split_begin, seen_end, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            block_id = tl.load(table + keys // CHUNK_SIZE).to(tl.int64)
            offset = keys % CHUNK_SIZE
            k_columns = k_head + block_id * k_block_stride + offset * K_DIM
            v_rows = v_head + block_id * v_block_stride + offset * V_DIM
            if K_DIM == BLOCK_K:
                k = tl.load(k_columns[None, :] + d_k[:, None])
            else:
                k = tl.load(k_columns[None, :] + d_k[:, None], mask=(d_k < K_DIM)[:, None], other=0.0)
            if V_DIM == BLOCK_V:
                v = tl.load(v_rows[:, None] + d_v[None, :])
            else:
                v = tl.load(v_rows[:, None] + d_v[None, :], mask=(d_v < V_DIM)[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision="ieee")
            if HAS_SOFTCAP:
                scores = _squeeze(scores * scaling, softcap) * _LOG2E
            else:
                scores *= scaling * _LOG2E
            highest, total, acc = _add(scores, v, highest, total, acc)
    for start in range(seen_end, split_end, BLOCK_N):
        # Key by key through the table, so that tiles may begin anywhere and chunks be of any size. What lies past the end
        # was never written: it is not read, because even with weight 0 a NaN would spread.
        keys = start + tl.arange(0, BLOCK_N)
        is_key = keys < end
        block_id = tl.load(table + keys // CHUNK_SIZE, mask=is_key, other=0).to(tl.int64)
        offset = keys % CHUNK_SIZE
        k_columns = k_head + block_id * k_block_stride + offset * K_DIM
        k = tl.load(k_columns[None, :] + d_k[:, None], mask=is_key[None, :] & (d_k < K_DIM)[:, None], other=0.0)
        v_rows = v_head + block_id * v_block_stride + offset * V_DIM
        v = tl.load(v_rows[:, None] + d_v[None, :], mask=is_key[:, None] & (d_v < V_DIM)[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            scores = _squeeze(scores, softcap)
        is_seen = keys[None, :] <= last_seen[:, None]
        if WINDOW > 0:
            is_seen &= keys[None, :] > last_seen[:, None] - WINDOW
        scores = tl.where(is_seen, scores * _LOG2E, float("-inf"))
        highest, total, acc = _add(scores, v, highest, total, acc)

    # Nothing was seen by rows of the padding, and by those whose window lies in other splits.
    has_seen = total > 0.0
    total = tl.where(has_seen, total, 1.0)
    acc = acc / total[:, None]
    is_out = is_row[:, None] & (d_v < V_DIM)[None, :]
    if split_len >= end - begin:
        out_rows = (token.to(tl.int64) * NUM_HEADS + head) * V_DIM
        tl.store(out + out_rows[:, None] + d_v[None, :], acc.to(out.dtype.element_ty), mask=is_out)
    else:
        partial = (index.to(tl.int64) * tl.num_programs(1) + head_tile) * BLOCK_M + r
        tl.store(partial_lse + partial, tl.where(has_seen, highest + tl.log2(total), _LOWEST), mask=is_row)
        tl.store(partial_out + partial[:, None] * V_DIM + d_v[None, :], acc, mask=is_out)


@triton.jit
def _combine_kernel(
    out,
    partial_out,
    partial_lse,
    combinations,
    segments,
    TILE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT_STEP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARERS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Combine ROWS rows of a tile from its splits, if more than one of them is not empty."""
    tile = combinations + tl.program_id(0) * 4
    head_tile = tl.program_id(2)
    first_work, num_splits = tl.load(tile + 2), tl.load(tile + 3)
    first_row, num_tokens, _, _, begin, end, split_len = _locate_tile(
        tile, segments, num_splits, TILE_TOKENS, WINDOW, SPLIT_STEP
    )
    if (num_tokens <= 0) | (split_len >= end - begin):
        return
    splits = tl.arange(0, MAX_SPLITS)
    is_split = splits < tl.cdiv(end - begin, split_len)
    d = tl.arange(0, BLOCK_V)
    mask = is_split[:, None] & (d < V_DIM)[None, :]
    first = tl.program_id(1) * ROWS
    for r in range(first, tl.minimum(first + ROWS, num_tokens * TILE_HEADS)):
        kv_head, head = _locate_head(head_tile, r, GROUP, SHARERS, TILE_HEADS)
        if head < (kv_head + 1) * GROUP:
            partial = ((first_work + splits).to(tl.int64) * tl.num_programs(2) + head_tile) * BLOCK_M + r
            lse = tl.load(partial_lse + partial, mask=is_split, other=_LOWEST)
            weights = tl.exp2(lse - tl.max(lse, axis=0))
            rows = tl.load(partial_out + partial[:, None] * V_DIM + d[None, :], mask=mask, other=0.0)
            row = tl.sum(rows * weights[:, None], axis=0) / tl.sum(weights, axis=0)
            token = (first_row + r // TILE_HEADS).to(tl.int64)
            tl.store(out + (token * NUM_HEADS + head) * V_DIM + d, row.to(out.dtype.element_ty), mask=d < V_DIM)
