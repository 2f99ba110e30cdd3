"""The FlashAttention backend: what it hands to torch, by a stand-in that does what varlen_attn's documentation says (there is
no FlashAttention for CPUs); and what it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from engine.attention import reference
from engine.attention.backend import choose_backend
from engine.attention.metadata import AttentionCall, AttentionMetadata, AttentionParams, LayerShape
from engine.errors import ConfigError, KernelBuildError

if find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from engine.attention import triton_paged, varlen

# Before that release torch's function knows no block tables; the backend refuses it then.
needs_block_tables = pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch's varlen_attn is too old")
CHUNK_SIZE = 256
CUDA = torch.device("cuda")


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """By its documentation: pools [pages, page_size, heads, dim]; the last query sees the last key; a window of (left, 0)
    sees `left` keys before its own."""
    assert all(each.dtype == torch.int32 and each.is_contiguous() for each in (cu_seq_q, cu_seq_k, seqused_k))
    assert block_table.dtype == torch.int32
    assert block_table.stride(-1) == query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert enable_gqa == (query.shape[1] != key.shape[2])
    out = torch.empty_like(query)
    num_keys = cu_seq_k.diff().tolist()
    assert num_keys == seqused_k.tolist()
    assert max(num_keys) == max_k
    assert cu_seq_q.diff().max() == max_q
    for i, length in enumerate(num_keys):
        rows = slice(int(cu_seq_q[i]), int(cu_seq_q[i + 1]))
        k, v = (pool[block_table[i].long()].flatten(0, 1)[:length].transpose(0, 1) for pool in (key, value))
        window = None if window_size[0] < 0 else window_size[0] + 1
        assert window_size[1] == 0
        attended = reference.attend_dense(query[rows].transpose(0, 1), k, v, AttentionParams(scale, window))
        out[rows] = attended.transpose(0, 1)
    return out


def call(k_dim: int, v_dim: int) -> AttentionCall:
    return AttentionCall(LayerShape(2, k_dim, v_dim), 4, AttentionParams(0.25))


def make_batch(heads: tuple[int, int], dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMetadata]:
    generator = torch.Generator().manual_seed(0)
    lengths = [(1, 300), (7, 600), (3, 3), (1, 256)]
    num_tokens = sum(query_len for query_len, _ in lengths)
    pools = [torch.randn(9, heads[1], CHUNK_SIZE, dim, generator=generator) for _ in range(2)]
    tables = torch.randperm(9, generator=generator).int()[:9].view(3, 3)
    segments, row = [], 0
    for table, (query_len, context_len) in zip((2, 0, 0, 1), lengths, strict=True):
        segments.append([row, query_len, context_len, table])
        row += query_len
    query = torch.randn(num_tokens, heads[0], dim, generator=generator).transpose(0, 1)
    slots = torch.zeros(num_tokens, dtype=torch.long)
    return query, *pools, AttentionMetadata(slots, torch.tensor(segments, dtype=torch.int32), tables, CHUNK_SIZE)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("window", [None, 1, 100])
def test_it_hands_over_what_gives_the_reference(heads, window, monkeypatch):
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: varlen_attn)
    query, k_pool, v_pool, metadata = make_batch(heads, 16)
    params = AttentionParams(0.25, window)
    expected = reference.attend(query, k_pool, v_pool, metadata, params)
    for _ in range(2):  # the second layer of the step
        torch.testing.assert_close(varlen.attend(query, k_pool, v_pool, metadata, params), expected)


@pytest.mark.parametrize("params", [AttentionParams(0.25, softcap=3.0), AttentionParams(0.25, sinks=torch.zeros(4))])
def test_what_it_does_not_know_goes_to_the_triton_kernel(params, monkeypatch):
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: pytest.fail("it cannot do that"))
    query, k_pool, v_pool, metadata = make_batch((4, 2), 16)
    expected = reference.attend(query, k_pool, v_pool, metadata, params)
    torch.testing.assert_close(varlen.attend(query, k_pool, v_pool, metadata, params), expected, atol=1e-5, rtol=1e-5)


def test_decode_batches_go_to_the_triton_kernel(monkeypatch):
    """CUDA graphs replay them, and what varlen_attn launches depends on their contexts."""
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: pytest.fail("it cannot be replayed"))
    query, k_pool, v_pool, metadata = make_batch((4, 2), 16)
    rows = metadata.segments[[0, 3]]
    rows[:, 0] = torch.arange(2)
    decodes = replace(metadata, segments=rows, is_decode_batch=True)
    expected = reference.attend(query[:, :2], k_pool, v_pool, decodes, AttentionParams(0.25))
    actual = varlen.attend(query[:, :2], k_pool, v_pool, decodes, AttentionParams(0.25))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert varlen.CAN_REPLAY_DECODES


@needs_block_tables
def test_torch_has_what_is_called():
    layers = (LayerShape(2, 64, 64),)
    with pytest.raises(KernelBuildError, match="needs a CUDA device"):
        varlen.load_kernel(torch.device("cpu"), layers, CHUNK_SIZE)


@needs_block_tables
def test_what_it_cannot_serve_is_refused_at_the_start(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(triton_paged, "load_kernel", lambda device: "here")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    good = (call(64, 64),)
    assert choose_backend("varlen", CUDA, torch.bfloat16, good, CHUNK_SIZE) is varlen
    assert "attention: FlashAttention (varlen), torch" in caplog.text
    refused = [
        (torch.float32, good, CHUNK_SIZE, "does not compute in torch.float32"),
        (torch.bfloat16, good, 32, "pages of 256 tokens; set chunk_size"),
        (torch.bfloat16, (call(192, 128),), CHUNK_SIZE, "heads of 192"),
        (torch.bfloat16, (call(4, 4),), CHUNK_SIZE, "heads of 4"),
    ]
    for dtype, calls, chunk_size, match in refused:
        with pytest.raises(ConfigError, match=match):
            choose_backend("varlen", CUDA, dtype, calls, chunk_size)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"compute capability 8\.0"):
        choose_backend("varlen", CUDA, torch.bfloat16, good, CHUNK_SIZE)


def test_a_torch_without_it_is_told_so(monkeypatch):
    monkeypatch.setattr(triton_paged, "load_kernel", lambda device: "here")
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: lambda query, key, value: None)
    with pytest.raises(ConfigError, match="has no block_table, enable_gqa"):
        choose_backend("varlen", CUDA, torch.bfloat16, (), CHUNK_SIZE)
    monkeypatch.undo()
    monkeypatch.setattr(triton_paged, "load_kernel", lambda device: "here")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    monkeypatch.delattr(torch.nn.attention, "varlen", raising=False)
    with pytest.raises(ConfigError, match=r"no torch\.nn\.attention\.varlen"):
        choose_backend("varlen", CUDA, torch.bfloat16, (), CHUNK_SIZE)
