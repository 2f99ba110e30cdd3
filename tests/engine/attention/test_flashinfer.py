"""The FlashInfer backend: what it hands over, when it plans, what it leaves to the Triton kernel.

There is no FlashInfer for CPUs: a stand-in does what its documentation and source say. Also what the backend rejects.
"""

from __future__ import annotations

import inspect
import random
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from engine.attention import choice, reference
from engine.attention.choice import choose_backend
from engine.attention.protocol import AttentionCall, AttentionMetadata, AttentionParams, LayerShape
from engine.errors import ConfigError
from tests.engine.attention.test_cpu import make_batch

if find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from engine.attention import flashinfer_paged, triton_paged
from engine.attention.flashinfer_paged import FlashInferAttention

CUDA = torch.device("cuda")


def call(num_kv_heads: int, k_dim: int, v_dim: int, window: int | None = None) -> AttentionCall:
    return AttentionCall(LayerShape(num_kv_heads, k_dim, v_dim), 4, AttentionParams(0.1, window))


GOOD = (call(2, 64, 64),)
# (query_len, context_len): decodes, prefills, new tokens at the end of contexts.
SEGMENTS = [(1, 13), (5, 5), (3, 11), (1, 8), (1, 1), (6, 17)]


# What was asked of the stand-in, in order.
log: list[str] = []


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper: keeps a plan, and computes any number of layers by it."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert len(float_workspace_buffer) >= 128 * 1024 * 1024
        assert kv_layout == "HND"

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        causal=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
    ):
        log.append("plan")
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        # The kernels are compiled for the type of one of them, and read all by it.
        assert all(array.dtype == torch.int32 and array.is_contiguous() for array in arrays)
        assert causal
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert qo_indptr[0] == paged_kv_indptr[0] == 0
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        assert (qo_indptr.diff() > 0).all()
        assert (paged_kv_last_page_len >= 1).all()
        assert (paged_kv_last_page_len <= page_size).all()
        self.arrays = arrays
        self.heads, self.head_dim, self.page_size = (num_qo_heads, num_kv_heads), head_dim_qk, page_size
        self.params = AttentionParams(sm_scale, None if window_left < 0 else window_left + 1, logits_soft_cap)
        self.dtypes = (q_data_type, kv_data_type)

    def run(self, q, paged_kv_cache, out=None):
        log.append("run")
        qo_indptr, kv_indptr, indices, last_page_len = self.arrays
        k_cache, v_cache = paged_kv_cache
        assert q.is_contiguous()
        assert q.shape == out.shape == (qo_indptr[-1], self.heads[0], self.head_dim)
        assert k_cache.shape[1:] == v_cache.shape[1:] == (self.heads[1], self.page_size, self.head_dim)
        assert k_cache.stride() == v_cache.stride()
        assert (q.dtype, k_cache.dtype) == self.dtypes
        for i, page_len in enumerate(last_page_len.tolist()):
            pages = indices[kv_indptr[i] : kv_indptr[i + 1]].long()
            length = (len(pages) - 1) * self.page_size + page_len
            k, v = (cache[pages].transpose(0, 1).flatten(1, 2)[:, :length] for cache in (k_cache, v_cache))
            rows = slice(int(qo_indptr[i]), int(qo_indptr[i + 1]))
            out[rows] = reference.attend_dense(q[rows].transpose(0, 1), k, v, self.params).transpose(0, 1)
        return out


class Event:
    def synchronize(self) -> None:
        log.append("wait for the copy")


def record_event(device: torch.device) -> Event:
    log.append("record")
    return Event()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    log.clear()
    monkeypatch.setattr(flashinfer_paged, "_wrapper_class", lambda: Wrapper)
    monkeypatch.setattr(flashinfer_paged, "_record_event", record_event)


def make_strided_batch(
    heads: tuple[int, int], dtype: torch.dtype = torch.float32, dim: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Pools as KVStore lays them out, the blocks of three layers side by side.

    One request has two segments, with a hole between them. NaN wherever no context lies.
    """
    query, k_pool, v_pool, metadata = make_batch(1, SEGMENTS, heads, dim, dim, 4, dtype)
    storage = torch.full((len(k_pool), 3, 2, *k_pool.shape[1:]), float("nan"), dtype=dtype)
    for index, pool in enumerate((k_pool, v_pool)):
        storage[:, 1, index] = pool
    segments = metadata.segments.clone()
    table_row = segments[-1, 3]
    segments[2] = torch.tensor([6, 3, 9, table_row])  # positions 6 to 8 of the request whose last 6 come at the end
    return query, storage[:, 1, 0], storage[:, 1, 1], replace(metadata, segments=segments)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (8, 1)])
@pytest.mark.parametrize(
    "params",
    [
        AttentionParams(0.25),
        AttentionParams(0.1, sliding_window=1),
        AttentionParams(0.25, sliding_window=5),
        AttentionParams(0.25, softcap=2.0),
        AttentionParams(0.25, sliding_window=6, softcap=1.5),
    ],
    ids=str,
)
def test_it_hands_over_what_gives_the_reference(heads, params):
    query, k_pool, v_pool, metadata = make_strided_batch(heads)
    expected = reference.attend(query, k_pool, v_pool, metadata, params)
    actual = FlashInferAttention().attend(query, k_pool, v_pool, metadata, params)
    assert not expected.isnan().any()
    torch.testing.assert_close(actual, expected)


def test_it_gets_rows_of_heads_however_the_query_lies():
    query, k_pool, v_pool, metadata = make_strided_batch((4, 2))
    assert not query.is_contiguous()
    params = AttentionParams(0.25)
    actual = FlashInferAttention().attend(query.contiguous(), k_pool, v_pool, metadata, params)
    torch.testing.assert_close(actual, reference.attend(query, k_pool, v_pool, metadata, params))


@pytest.mark.parametrize("dtype", flashinfer_paged.DTYPES)
def test_half_precision_is_planned_as_such(dtype):
    query, k_pool, v_pool, metadata = make_strided_batch((4, 2), dtype)
    actual = FlashInferAttention().attend(query, k_pool, v_pool, metadata, AttentionParams(0.25))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, reference.attend(query, k_pool, v_pool, metadata, AttentionParams(0.25)))


def test_a_step_has_one_plan_for_all_layers_that_differ_in_nothing_but_their_kv():
    query, k_pool, v_pool, metadata = make_strided_batch((4, 2))
    backend, full, window = FlashInferAttention(), AttentionParams(0.25), AttentionParams(0.25, sliding_window=5)
    expected = {params: reference.attend(query, k_pool, v_pool, metadata, params) for params in (full, window)}
    for step in range(2):
        log.clear()
        step_metadata = replace(metadata, derived={})
        for params in (full, window, full, window, full):
            actual = backend.attend(query, k_pool, v_pool, step_metadata, params)
            torch.testing.assert_close(actual, expected[params])
        waits = ["wait for the copy"] if step > 0 else []  # a wrapper's first plan has nothing to wait for
        assert log == [*waits, "plan", "record", "run"] * 2 + ["run"] * 3


def test_a_batch_that_comes_again_after_another_is_planned_again():
    query, k_pool, v_pool, first = make_strided_batch((4, 2))
    second = replace(first, segments=first.segments[:1], derived={})
    backend, params = FlashInferAttention(), AttentionParams(0.25)
    for rows, metadata in ((query, first), (query[:, :1], second), (query, first)):
        expected = reference.attend(rows, k_pool, v_pool, metadata, params)
        torch.testing.assert_close(backend.attend(rows, k_pool, v_pool, metadata, params), expected)
    assert log.count("plan") == 3


def test_a_plan_that_fails_is_not_taken_for_one(monkeypatch):
    query, k_pool, v_pool, metadata = make_strided_batch((4, 2))
    backend, params = FlashInferAttention(), AttentionParams(0.25)
    backend.attend(query, k_pool, v_pool, metadata, params)

    def fail(*_, **__):
        raise RuntimeError("out of workspace")

    other = replace(metadata, derived={})
    with monkeypatch.context() as patched:
        patched.setattr(Wrapper, "plan", fail)
        with pytest.raises(RuntimeError, match="out of workspace"):
            backend.attend(query, k_pool, v_pool, other, params)
    for batch in (metadata, other):
        backend.attend(query, k_pool, v_pool, batch, params)
    assert log.count("plan") == 3


def test_segments_in_host_memory_are_used_where_they_are_there():
    query, k_pool, v_pool, metadata = make_strided_batch((4, 2))
    params = AttentionParams(0.25)
    expected = reference.attend(query, k_pool, v_pool, metadata, params)
    on_host = replace(
        metadata, host_segments=metadata.segments.numpy(), segments=torch.full_like(metadata.segments, -1)
    )
    torch.testing.assert_close(FlashInferAttention().attend(query, k_pool, v_pool, on_host, params), expected)


def test_the_workspace_holds_the_partial_results_of_many_heads():
    """For a group of 16 query heads of 128 features on 132 processors it would not be enough to take what is recommended."""
    key = flashinfer_paged._PlanKey(32, 2, 128, 32, torch.bfloat16, 0.1, -1, None)
    assert flashinfer_paged._partial_bytes(key, 132) == 132 * 128 * 32 * 129 * 4
    backend = FlashInferAttention()
    small = backend._workspace_for(key, torch.device("cpu"))
    assert len(small) == flashinfer_paged.MIN_WORKSPACE_BYTES
    assert backend._workspace_for(key, torch.device("cpu")) is small
    larger = backend._workspace_for(replace(key, num_heads=2000), torch.device("cpu"))
    assert len(larger) == 8 * 128 * 2000 * 129 * 4


# -- what goes to the Triton kernel --------------------------------------------------------------------------------------


def test_sinks_go_to_the_triton_kernel():
    query, k_pool, v_pool, metadata = make_strided_batch((4, 2))
    params = AttentionParams(0.25, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    expected = reference.attend(query, k_pool, v_pool, metadata, params)
    actual = FlashInferAttention().attend(query, k_pool, v_pool, metadata, params)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert log == []


def test_decode_batches_go_to_the_triton_kernel():
    """With padding, of which FlashInfer would be told that a context has no last block."""
    query, k_pool, v_pool, metadata = make_batch(1, [(1, 13), (1, 4)], (4, 2), 16, 16, 4, torch.float32)
    expected = reference.attend(query, k_pool, v_pool, metadata, AttentionParams(0.25))
    padding = torch.zeros(1, 4, dtype=torch.int32)
    padded = replace(metadata, segments=torch.cat([metadata.segments, padding]), is_decode_batch=True)
    rows = torch.cat([query, query[:, :1]], dim=1)
    actual = FlashInferAttention().attend(rows, k_pool, v_pool, padded, AttentionParams(0.25))
    torch.testing.assert_close(actual[:2], expected, atol=1e-5, rtol=1e-5)
    assert log == []
    assert FlashInferAttention.CAN_REPLAY_DECODES


def test_it_writes_by_the_triton_kernel():
    _, k_pool, v_pool, metadata = make_strided_batch((4, 2))
    slots = torch.tensor([random.Random(0).randrange(20)])
    key, value = torch.ones(2, 1, 16), torch.full((2, 1, 16), 2.0)
    FlashInferAttention().write_kv(k_pool, v_pool, key, value, replace(metadata, slot_mapping=slots))
    block_id, offset = divmod(int(slots), 4)
    assert (k_pool[block_id, :, offset] == 1).all()
    assert (v_pool[block_id, :, offset] == 2).all()


# -- choosing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A device that everything loads on; the toys run here."""
    monkeypatch.setattr(triton_paged, "load_kernel", lambda device: "here")
    monkeypatch.setattr(choice, "find_fault", lambda *_: None)  # see test_cpu.py
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(__version__="0.7"))
    toy = flashinfer_paged._attend_over_toy
    monkeypatch.setattr(flashinfer_paged, "_attend_over_toy", lambda _, *shape: toy(torch.device("cpu"), *shape))


def test_it_is_chosen_once_a_toy_of_each_kind_of_call_has_run(pretended_gpu, caplog):
    """A window is a kernel of its own there, which is to be compiled before anybody waits for it."""
    caplog.set_level("INFO")
    calls = (call(2, 64, 64), call(1, 128, 128), call(2, 64, 64), call(2, 64, 64, window=7))
    chosen = [choose_backend("flashinfer", CUDA, torch.bfloat16, calls, chunk_size) for chunk_size in (1, 32)]
    assert all(isinstance(each, FlashInferAttention) for each in chosen)
    assert chosen[0] is not chosen[1]  # each has the plans of one engine
    assert "attention: FlashInfer (flashinfer), flashinfer 0.7" in caplog.text
    assert log == ["plan", "record", "run"] * 6


@pytest.mark.parametrize(
    ("dtype", "calls", "match"),
    [
        (torch.float32, GOOD, "does not compute in torch.float32; use 'triton'"),
        (torch.bfloat16, (*GOOD, call(2, 128, 64)), r"heads of 128 \(K\) and 64 \(V\) features.* use 'triton'"),
        (torch.bfloat16, (call(2, 80, 80),), "heads of 80.* one of 64, 128, 256; use 'triton'"),
    ],
)
def test_what_it_cannot_serve_is_refused_at_the_start(pretended_gpu, dtype, calls, match):
    with pytest.raises(ConfigError, match=match):
        choose_backend("flashinfer", CUDA, dtype, calls, 32)


def test_other_devices_are_refused(pretended_gpu, monkeypatch):
    with pytest.raises(ConfigError, match=r"CUDA device of compute capability 8\.0 or more, not cpu"):
        choose_backend("flashinfer", torch.device("cpu"), torch.bfloat16, GOOD, 32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"compute capability 8\.0 or more, not cuda"):
        choose_backend("flashinfer", CUDA, torch.bfloat16, GOOD, 32)


def test_where_it_is_not_installed_the_extra_is_named(pretended_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match=r"cannot be imported.*pip install 'pensieve-ray\[flashinfer\]'"):
        choose_backend("flashinfer", CUDA, torch.bfloat16, GOOD, 32)


def test_where_its_kernels_cannot_be_compiled_the_compiler_is_named(pretended_gpu, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Ninja build failed.\nhundreds of lines")

    monkeypatch.setattr(Wrapper, "plan", fail)
    with pytest.raises(ConfigError, match=r"cannot run here: RuntimeError: Ninja build failed\.; .*nvcc") as caught:
        choose_backend("flashinfer", CUDA, torch.bfloat16, GOOD, 32)
    assert "hundreds" not in caught.value.message


def test_flashinfer_has_what_is_called():
    """The arguments of the stand-in, in their order, are those of the real one."""
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer, which is optional, is not installed")
    real = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    for name, num_positional in (("__init__", 3), ("plan", 9), ("run", 3)):
        ours = inspect.signature(getattr(Wrapper, name)).parameters
        theirs = inspect.signature(getattr(real, name)).parameters
        assert list(ours)[:num_positional] == list(theirs)[:num_positional]
        assert ours.keys() <= theirs.keys()
        for parameter in list(ours)[num_positional:]:
            assert ours[parameter].default == theirs[parameter].default
