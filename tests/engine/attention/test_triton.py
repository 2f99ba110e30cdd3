"""The Triton kernel against the torch reference over random ragged batches.

Without a GPU it runs in Triton's interpreter, which is slow (tiny sizes) and wrong in bfloat16; another test compiles it
for GPUs, and those marked `gpu` run it on one. What the segments do not cover holds NaN, and so does fresh memory. Whole
models: test_backends.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton, which is optional, is not installed")

import engine.attention
from engine.attention import reference, triton_paged
from engine.attention.choice import choose_backend
from engine.attention.protocol import AttentionMetadata, AttentionParams
from engine.attention.tiling import SPLIT_STEP, RefilledTiling, Tiling
from engine.errors import ConfigError
from tests.engine.attention.test_cpu import NUM_GUARD_BLOCKS, expected_output, make_batch

interpreted = pytest.mark.skipif(not triton_paged.IS_INTERPRETED, reason="there is a GPU, or TRITON_INTERPRET is not 1")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}
GPU_TOLERANCE = {**TOLERANCE, torch.float32: 1e-4}  # its exp2 is approximate
# (query heads, KV heads): one to one, grouped, and more query heads than a tile has rows in float32.
HEADS = [(1, 1), (4, 4), (6, 2), (8, 1), (38, 2)]


@pytest.fixture(autouse=True)
def fresh_memory_holds_nan():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def assert_right(seed, segments, heads, k_dim, v_dim, chunk_size, dtype, params, device="cpu", on_host=True) -> None:
    query, k_pool, v_pool, metadata = make_batch(seed, segments, heads, k_dim, v_dim, chunk_size, dtype)
    expected = expected_output(query, k_pool, v_pool, metadata, params)
    moved = replace(
        metadata,
        segments=metadata.segments.to(device),
        block_tables=metadata.block_tables.to(device),
        host_segments=metadata.segments.numpy() if on_host else None,
    )
    sinks = params.sinks.to(device) if params.sinks is not None else None
    tensors = (tensor.to(device) for tensor in (query, k_pool, v_pool))
    actual = triton_paged.attend(*tensors, moved, replace(params, sinks=sinks))
    assert actual.dtype == dtype
    tolerance = (TOLERANCE if device == "cpu" else GPU_TOLERANCE)[dtype]
    torch.testing.assert_close(actual.cpu().float(), expected, atol=tolerance, rtol=tolerance)


@interpreted
@given(
    seed=st.integers(0, 2**16),
    segments=st.lists(
        st.tuples(st.one_of(st.just(1), st.integers(1, 20)), st.integers(0, 60)).map(lambda t: (t[0], t[0] + t[1])),
        min_size=1,
        max_size=4,
    ),
    heads=st.sampled_from(HEADS),
    dims=st.sampled_from([(4, 4), (8, 12), (20, 16), (32, 20)]),
    chunk_size=st.sampled_from([1, 4, 5, 16, 32, 100]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    window=st.sampled_from([None, 1, 7, 64]),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_random_ragged_batches_equal_the_reference(
    seed, segments, heads, dims, chunk_size, dtype, window, softcap, has_sinks
):
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed)) if has_sinks else None
    params = AttentionParams(dims[0] ** -0.5, window, softcap, sinks)
    assert_right(seed, segments, heads, *dims, chunk_size, dtype, params)


@interpreted
@pytest.mark.parametrize("window", [None, 9, 400])
@pytest.mark.parametrize("segments", [[(1, 900)], [(1, 257), (1, 3), (1, 640)], [(2, 1300)]], ids=str)
def test_split_contexts_equal_the_reference(segments, window):
    """Sinks count once, and a window may leave one split of several."""
    sinks = torch.tensor([0.5, 3.0])
    assert_right(3, segments, (2, 1), 16, 12, 32, torch.float32, AttentionParams(0.25, window, None, sinks))


@interpreted
@given(
    seed=st.integers(0, 2**16),
    segments=st.lists(
        st.tuples(st.integers(1, 3), st.one_of(st.integers(1, 40), st.integers(254, 800))).map(
            lambda t: (t[0], t[0] + t[1])
        ),
        min_size=1,
        max_size=3,
    ),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    chunk_size=st.sampled_from([16, 32, 100]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    window=st.sampled_from([None, 64, 300]),
    has_sinks=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_random_split_contexts_equal_the_reference(seed, segments, heads, chunk_size, dtype, window, has_sinks):
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed)) if has_sinks else None
    assert_right(seed, segments, heads, 16, 12, chunk_size, dtype, AttentionParams(0.25, window, None, sinks))


@interpreted
def test_without_host_segments_the_device_is_asked():
    assert_right(1, [(3, 10), (1, 5)], (2, 2), 8, 8, 4, torch.float32, AttentionParams(0.3), on_host=False)


@interpreted
def test_layers_of_a_step_share_the_tiling():
    query, k_pool, v_pool, metadata = make_batch(1, [(5, 20), (1, 30)], (4, 2), 8, 8, 16, torch.float32)
    for window in (None, 3):
        triton_paged.attend(query, k_pool, v_pool, metadata, AttentionParams(0.3, window))
    (tiling,) = [value for value in metadata.derived.values() if isinstance(value, Tiling)]
    triton_paged.attend(query, k_pool[:, :1], v_pool[:, :1], metadata, AttentionParams(0.3))  # fewer KV heads
    tilings = [value for value in metadata.derived.values() if isinstance(value, Tiling)]
    assert len(tilings) == 2
    assert tilings[0] is tiling


@interpreted
@pytest.mark.parametrize(("segments", "rows"), [([(40, 40), (33, 90)], 128), ([(40, 40), (1, 90)], 64)], ids=str)
def test_a_batch_of_prompts_alone_has_larger_tiles(segments, rows):
    """Decodes would leave most rows of such a tile empty."""
    query, k_pool, v_pool, metadata = make_batch(1, segments, (8, 2), 16, 16, 16, torch.float16)
    metadata = replace(metadata, host_segments=metadata.segments.numpy())
    actual = triton_paged.attend(query, k_pool, v_pool, metadata, AttentionParams(0.3))
    expected = expected_output(query, k_pool, v_pool, metadata, AttentionParams(0.3))
    torch.testing.assert_close(actual.float(), expected, atol=1e-2, rtol=1e-2)
    (tiling,) = [value for value in metadata.derived.values() if isinstance(value, Tiling)]
    assert tiling.tile_tokens * 4 == rows


# -- batches of decodes, as a CUDA graph replays them --------------------------------------------------------------------


class DecodeBatch:
    """A batch of `size` segments, the last ones padding. `fill` gives its tensors new contents in place."""

    def __init__(self, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.query = torch.full((4, size, 16), float("nan"), dtype=dtype, device=device)
        self.pools = [torch.empty(60, 2, 16, dim, dtype=dtype, device=device) for dim in (16, 12)]
        self.metadata = AttentionMetadata(
            torch.full((size,), -1, device=device),
            torch.zeros(size, 4, dtype=torch.int32, device=device),
            torch.zeros(size, 60, dtype=torch.int32, device=device),
            16,
            is_decode_batch=True,
        )

    def fill(self, seed: int, context_lens: list[int]) -> torch.Tensor:
        """Returns what attention has to give for the rows that are not padding."""
        batch = make_batch(seed, [(1, context_len) for context_len in context_lens], (4, 2), 16, 12, 16, self.dtype)
        query, k_pool, v_pool, metadata = batch
        count, tables = len(context_lens), metadata.block_tables[: len(self.metadata.segments)]
        self.query[:, :count] = query.to(self.query.device)
        for pool, source in zip(self.pools, (k_pool, v_pool), strict=True):
            pool.fill_(float("nan"))
            pool[: len(source)] = source.to(pool.device)
        self.metadata.segments.zero_()
        self.metadata.segments[:count] = metadata.segments.to(self.query.device)
        self.metadata.block_tables[: len(tables), : tables.shape[1]] = tables.to(self.query.device)
        return expected_output(query, k_pool, v_pool, metadata, PARAMS)


PARAMS = AttentionParams(0.25, softcap=3.0)


@interpreted
def test_a_padded_decode_batch_is_right_and_launches_the_same_whatever_it_holds():
    batch = DecodeBatch(7)
    tilings = []
    for seed, context_lens in enumerate([[1, 30], [700, 5, 16], [129, 20, 3, 1, 9]]):
        expected = batch.fill(seed, context_lens)
        out = triton_paged.attend(batch.query, *batch.pools, batch.metadata, PARAMS)
        torch.testing.assert_close(out[: len(context_lens)], expected, atol=1e-5, rtol=1e-5)
        assert out[len(context_lens) :].isnan().all()  # nothing was written there
        tilings.append(next(iter(batch.metadata.derived.values())))
    assert tilings[0] is tilings[1] is tilings[2]
    assert len(tilings[0].work) == 7 * 2


def refilled_batch(num_rows: int, num_segments: int, device: str, dtype: torch.dtype):
    """Tensors with room for so many rows and segments, as a recorded step has them: query, pools, metadata."""
    query = torch.full((4, num_rows, 16), float("nan"), dtype=dtype, device=device)
    pools = [torch.full((140, 2, 16, dim), float("nan"), dtype=dtype, device=device) for dim in (16, 12)]
    metadata = AttentionMetadata(
        torch.full((num_rows,), -1, device=device),
        torch.zeros(num_segments, 4, dtype=torch.int32, device=device),
        torch.zeros(num_segments + 2, 140, dtype=torch.int32, device=device),
        16,
        is_refilled=True,
    )
    return query, pools, metadata


def refill(target, seed: int, segments: list[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    """Put another batch into the tensors. Returns what attention has to give for its rows."""
    query, pools, metadata = target
    source = make_batch(seed, segments, (4, 2), 16, 12, 16, dtype)
    query[:, : source[0].shape[1]] = source[0].to(query.device)
    for pool, contents in zip(pools, source[1:3], strict=True):
        pool.fill_(float("nan"))
        pool[: len(contents)] = contents.to(pool.device)
    metadata.segments.zero_()
    metadata.segments[: len(segments)] = source[3].segments.to(query.device)
    tables = source[3].block_tables
    metadata.block_tables[: len(tables), : tables.shape[1]] = tables.to(query.device)
    for tiling in metadata.derived.values():
        tiling.refill(source[3].segments.numpy())
    return expected_output(*source, PARAMS)


REFILLS = (
    [(30, 30)],
    [(1, 500), (9, 20), (1, 3), (7, 1100)],
    [(1, 1500)],
    [(1, n + 1) for n in range(5)],
    [(40, 1500)],
)


@interpreted
def test_a_batch_of_any_lengths_is_right_in_the_room_of_a_recorded_one():
    target = refilled_batch(40, 6, "cpu", torch.float32)
    triton_paged.attend(target[0], *target[1], target[2], PARAMS)  # of nothing, as it is recorded
    (tiling,) = target[2].derived.values()
    places = tiling.work.data_ptr(), tiling.combinations.data_ptr(), len(tiling.work), len(tiling.combinations)
    for seed, segments in enumerate(REFILLS):
        expected = refill(target, seed, segments, torch.float32)
        out = triton_paged.attend(target[0], *target[1], target[2], PARAMS)
        torch.testing.assert_close(out[: len(expected)], expected, atol=1e-5, rtol=1e-5)
    assert target[2].derived == {next(iter(target[2].derived)): tiling}
    assert places == (
        tiling.work.data_ptr(),
        tiling.combinations.data_ptr(),
        len(tiling.work),
        len(tiling.combinations),
    )


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30_000)), min_size=1, max_size=6),
    tile_tokens=st.sampled_from([4, 16, 64]),
    num_head_tiles=st.sampled_from([1, 8, 40, 2000]),
)
@settings(deadline=None)
def test_the_room_is_enough_for_any_batch(lengths, tile_tokens, num_head_tiles):
    tiling = RefilledTiling(6 * 40, 7, tile_tokens, num_head_tiles, 264, 8 * SPLIT_STEP, torch.device("cpu"))
    segments = [(0, query_len, query_len + before, i) for i, (query_len, before) in enumerate(lengths)]
    tiling.refill(np.array(segments, np.int32))
    num_tiles = sum(-(-query_len // tile_tokens) for query_len, _ in lengths)
    assert len({tuple(entry[:2]) for entry in tiling.work.tolist()} - {(6, 0)}) == num_tiles


@pytest.mark.gpu
@on_gpu
def test_a_batch_of_any_lengths_can_be_captured_and_replayed():
    target = refilled_batch(40, 6, "cuda", torch.float16)
    triton_paged.attend(target[0], *target[1], target[2], PARAMS)  # compiles, and makes the tiling
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_paged.attend(target[0], *target[1], target[2], PARAMS)
    for seed, segments in enumerate(REFILLS):
        expected = refill(target, seed, segments, torch.float16)
        graph.replay()
        torch.testing.assert_close(out[: len(expected)].cpu().float(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@on_gpu
def test_a_decode_batch_can_be_captured_and_replayed():
    batch = DecodeBatch(7, "cuda", torch.float16)
    batch.fill(0, [1, 30])
    triton_paged.attend(batch.query, *batch.pools, batch.metadata, PARAMS)  # compiles, and makes the tiling
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_paged.attend(batch.query, *batch.pools, batch.metadata, PARAMS)
    for seed, context_lens in enumerate([[700, 5, 16], [129, 20, 3, 1, 9]]):
        expected = batch.fill(seed, context_lens)
        graph.replay()
        torch.testing.assert_close(out[: len(context_lens)].cpu().float(), expected, atol=1e-2, rtol=1e-2)


# -- writing -----------------------------------------------------------------------------------------------------------


def assert_writes_right(seed, num_tokens, num_heads, dims, chunk_size, dtype, device="cpu") -> None:
    """The same slots as the reference, those of -1 left out, and no others."""
    num_blocks = -(-num_tokens // chunk_size) + NUM_GUARD_BLOCKS
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_blocks * chunk_size, generator=generator)[:num_tokens]
    slots[torch.rand(num_tokens, generator=generator) < 0.2] = -1
    nothing = torch.zeros(0, 4, dtype=torch.int32)
    key, value = (torch.randn(num_tokens, num_heads, d, generator=generator).to(dtype).transpose(0, 1) for d in dims)
    expected, actual = (
        [torch.zeros(num_blocks, num_heads, chunk_size, dim, dtype=dtype) for dim in dims] for _ in "ab"
    )
    kept = slots >= 0
    reference.write_kv(
        *expected, key[:, kept], value[:, kept], AttentionMetadata(slots[kept], nothing, nothing, chunk_size)
    )
    pools = [pool.to(device) for pool in actual]
    metadata = AttentionMetadata(slots.to(device), nothing, nothing, chunk_size)
    triton_paged.write_kv(*pools, key.to(device), value.to(device), metadata)
    for pool, right in zip(pools, expected, strict=True):
        assert torch.equal(pool.cpu(), right)


@interpreted
@given(
    seed=st.integers(0, 2**16),
    num_tokens=st.integers(1, 50),
    num_heads=st.integers(1, 3),
    dims=st.sampled_from([(4, 4), (8, 3), (5, 16)]),
    chunk_size=st.sampled_from([1, 3, 32]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(deadline=None, max_examples=30)
def test_writes_equal_the_reference(seed, num_tokens, num_heads, dims, chunk_size, dtype):
    assert_writes_right(seed, num_tokens, num_heads, dims, chunk_size, dtype)


@interpreted
def test_pools_may_be_views_of_blocks_that_hold_all_layers():
    """As KVStore lays them out: the stride between blocks is that of all layers together."""
    query, k_pool, v_pool, metadata = make_batch(1, [(1, 50), (3, 20)], (4, 2), 8, 8, 16, torch.float32)
    storage = torch.full((len(k_pool), 3 * k_pool[0].numel()), float("nan"))
    views = [storage[:, i * k_pool[0].numel() : (i + 1) * k_pool[0].numel()].view(k_pool.shape) for i in (1, 2)]
    for view, pool in zip(views, (k_pool, v_pool), strict=True):
        view.copy_(pool)
    actual, expected = (
        triton_paged.attend(query, *p, metadata, AttentionParams(0.3)) for p in (views, (k_pool, v_pool))
    )
    assert torch.equal(actual, expected)
    key = torch.ones(2, 4, 8)
    triton_paged.write_kv(*views, key, key, metadata)
    assert views[0][0, :, 0].eq(1).all()
    assert storage[:, : k_pool[0].numel()].isnan().all()


def test_wrong_tensors_are_refused():
    query, k_pool, v_pool, metadata = make_batch(1, [(1, 50)], (4, 2), 8, 8, 16, torch.float32)
    params = AttentionParams(0.3)
    with pytest.raises(ValueError, match="same dtype"):
        triton_paged.attend(query.half(), k_pool, v_pool, metadata, params)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        triton_paged.attend(query[:3], k_pool, v_pool, metadata, params)
    with pytest.raises(ValueError, match="k_dim"):
        triton_paged.attend(query[..., :4], k_pool, v_pool, metadata, params)
    with pytest.raises(ValueError, match="contiguous"):
        triton_paged.attend(query, k_pool[:, :, ::2], v_pool, metadata, params)
    with pytest.raises(ValueError, match="of their pools"):
        triton_paged.write_kv(k_pool, v_pool, query, query, metadata)


# -- on a GPU, or for one ------------------------------------------------------------------------------------------------


def test_it_compiles_for_gpus_and_fits_their_shared_memory():
    """Ahead of time, which needs no GPU: Ampere and Hopper, decodes and prefills, with and without everything optional."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.engine.attention.compile_triton"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(engine.attention.__file__).parents[2],
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("compiled") == 44
    assert process.stdout.count("bytes of registers spilled") == 6


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("heads", "k_dim", "v_dim", "chunk_size", "params"),
    [
        ((32, 8), 128, 128, 32, AttentionParams(128**-0.5)),
        ((12, 12), 64, 64, 16, AttentionParams(0.125, sliding_window=100)),
        ((8, 4), 256, 256, 32, AttentionParams(0.0625, sliding_window=300, softcap=50.0)),
        ((16, 2), 64, 64, 5, AttentionParams(0.125, 128, None, torch.linspace(-1, 1, 16))),
        ((16, 16), 192, 128, 32, AttentionParams(0.07)),
        ((71, 1), 80, 80, 1, AttentionParams(0.1)),
    ],
    ids=str,
)
def test_on_a_gpu_it_equals_the_reference(heads, k_dim, v_dim, chunk_size, params, dtype):
    device = "cuda"
    for segments in ([(1, 1), (1, 3000), (1, 77)], [(70, 300), (1, 5000), (33, 33), (5, 2000)]):
        assert_right(1, segments, heads, k_dim, v_dim, chunk_size, dtype, params, device)
    assert_writes_right(1, 100, heads[1], (k_dim, v_dim), chunk_size, dtype, device)


# -- choosing ----------------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda")


@interpreted
def test_it_is_there_on_a_cpu_only_where_it_is_interpreted(monkeypatch, caplog):
    caplog.set_level("INFO")
    assert choose_backend("triton", torch.device("cpu"), torch.float32) is triton_paged
    assert "attention: Triton kernel (triton), interpreted" in caplog.text
    monkeypatch.setattr(triton_paged, "IS_INTERPRETED", False)
    with pytest.raises(ConfigError, match=r"not on a CUDA device; use 'auto'.*TRITON_INTERPRET=1"):
        choose_backend("triton", torch.device("cpu"), torch.float32)


def test_auto_is_triton_on_a_gpu(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(triton_paged, "load_kernel", lambda device: f"triton on {device}")
    assert choose_backend("auto", CUDA, torch.bfloat16) is triton_paged
    assert "attention: Triton kernel (triton), triton on cuda" in caplog.text
    assert choose_backend("reference", CUDA, torch.bfloat16) is reference


def test_without_triton_auto_is_the_reference_and_says_why(monkeypatch, caplog):
    monkeypatch.delattr(engine.attention, "triton_paged")
    monkeypatch.setitem(sys.modules, "engine.attention.triton_paged", None)
    assert choose_backend("auto", CUDA, torch.bfloat16) is reference
    assert "triton cannot be imported" in caplog.text
    assert "pip install 'pensieve-ray[gpu]'" in caplog.text
    with pytest.raises(ConfigError, match="pip install"):
        choose_backend("triton", CUDA, torch.bfloat16)


def test_where_it_cannot_run_auto_is_the_reference_and_says_why(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_paged, "write_kv", fail)
    load_kernel = triton_paged.load_kernel
    monkeypatch.setattr(triton_paged, "load_kernel", lambda _: load_kernel(torch.device("cpu")))
    assert choose_backend("auto", CUDA, torch.bfloat16) is reference
    assert "cannot run here: RuntimeError('Failed to find C compiler')" in caplog.text
    with pytest.raises(ConfigError, match="C compiler"):
        choose_backend("triton", CUDA, torch.bfloat16)


def test_a_dtype_that_it_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="float64"):
        choose_backend("triton", CUDA, torch.float64)
