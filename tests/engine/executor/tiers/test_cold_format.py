"""Records of the cold tiers: their error, that a record is encoded to itself, and three codecs that agree."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.protocol import LayerShape
from engine.errors import KernelBuildError
from engine.executor.tiers import cold_copies
from engine.executor.tiers.block_copy import columns_of
from engine.executor.tiers.cold_copies import ColdCopies, ReferenceColdCopies, load_library, make_cold_copies
from engine.executor.tiers.cold_format import PAGE_BYTES, ColdFormat
from engine.executor.tiers.kv_content import TailView
from engine.executor.tiers.kv_store import ColdStore, KVStore, block_bytes
from tests.copies import swap_in, swap_out

needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
KINDS = ("fp8", "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads, and dims, that are odd, alone, different for K and V, and no power of two.
SHAPES = ([LayerShape(2, 8, 8)] * 2, [LayerShape(3, 5, 2), LayerShape(1, 1, 3)], [LayerShape(1, 24, 17)])


def make_stores(
    kind: str, layers, chunk_size: int, dtype: torch.dtype, num_blocks: int = 3
) -> tuple[KVStore, ColdStore]:
    gpu = KVStore(layers, num_blocks=num_blocks, chunk_size=chunk_size, dtype=dtype, device=torch.device("cpu"))
    return gpu, ColdStore(ColdFormat(kind, layers, chunk_size, dtype), num_blocks=num_blocks)


def fill(gpu: KVStore, seed: int) -> None:
    """Values of many magnitudes, zeros, and heads that are constant."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(gpu.storage.shape, generator=random) * torch.randn(gpu.storage.shape, generator=random).exp()
    values[torch.rand(gpu.storage.shape, generator=random) < 0.1] = 0.0
    gpu.storage.copy_(values)
    gpu.layer_pools[0][1][:, 0] = 3.0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_was_decoded_is_encoded_to_the_same_record(kind, data):
    """So a chunk that comes back and goes out again loses nothing more."""
    dtype = data.draw(st.sampled_from(DTYPES))
    chunk_size, num_tokens = data.draw(st.sampled_from([(1, None), (4, None), (4, 1), (4, 3)]))
    width = 16 if dtype == torch.float16 else 32
    numbers = st.floats(width=width, allow_nan=False, allow_infinity=False, min_value=-60000, max_value=60000)
    near = st.builds(
        lambda value, ulps: value * (1 + ulps * 2.0**-10), st.sampled_from([1.0, -3.0, 250.0]), st.integers(-9, 9)
    )
    layers = [LayerShape(1, 3, 3)]
    cold = ColdFormat(kind, layers, chunk_size, dtype)
    size = cold.num_elements
    block = torch.tensor(data.draw(st.lists(numbers | near, min_size=size, max_size=size))).to(dtype)
    record = cold.encode(block, num_tokens)
    back = torch.empty_like(block)
    cold.decode(record, back, [0])
    assert torch.equal(cold.encode(back, num_tokens), record)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_value_is_bounded_by_its_group(kind, dtype):
    gpu, cold = make_stores(kind, [LayerShape(2, 16, 8)], 8, dtype, num_blocks=1)
    fill(gpu, 1)
    exact = [pool[0].float() for pool in gpu.layer_pools[0]]
    exact = [values.clone() for values in exact]
    cold.format.decode(cold.format.encode(gpu.storage[0]), gpu.storage[0], [0])
    rounding = 2.0 ** {torch.float32: -22, torch.bfloat16: -8, torch.float16: -10}[dtype]
    for axis, before, pool in zip((1, 2), exact, gpu.layer_pools[0], strict=True):
        errors = (pool[0].float() - before).abs()
        if kind == "fp8":  # half a step of three bits, or of the least numbers
            allowed = before.abs() * 2.0**-4 + before.abs().amax((1, 2), keepdim=True) * 2.0**-16
        else:
            levels = {"int8": 255, "int4": 15}[kind]
            allowed = (before.amax(axis, keepdim=True) - before.amin(axis, keepdim=True)) / (2 * levels)
        allowed = allowed * 1.001 + before.abs() * rounding
        assert (errors <= allowed).all()
        assert errors.max() > 0 or dtype != torch.float32  # it is lossy: another codec would be tested otherwise


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_behind_the_valid_tokens_is_not_in_a_record(kind):
    """It may be another tenant's: neither as a number nor as a bound."""
    gpu, cold = make_stores(kind, [LayerShape(2, 4, 6)], 4, torch.float32)
    fill(gpu, 2)
    gpu.storage[1] = gpu.storage[0]
    for pool in gpu.layer_pools[0]:
        pool[1, :, 3:] = float("nan")
        pool[0, :, 3:] = 1e9
    assert torch.equal(cold.format.encode(gpu.storage[0], 3), cold.format.encode(gpu.storage[1], 3))
    whole = cold.format.encode(gpu.storage[0])
    assert not torch.equal(whole, cold.format.encode(gpu.storage[0], 3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_of_a_record_is_cut_for_those_outside(kind):
    gpu, cold = make_stores(kind, [LayerShape(2, 4, 6)], 4, torch.float32)
    fill(gpu, 3)
    cold.storage[0] = cold.format.encode(gpu.storage[0])
    cut = torch.frombuffer(TailView(cold).copy(0, 1), dtype=torch.uint8)
    back, expected = torch.empty_like(gpu.storage[0]), torch.empty_like(gpu.storage[0])
    cold.format.decode(cut, back, [0])
    cold.format.decode(cold.storage[0], expected, [0])
    changed = [
        (a != b).view(2, 4, -1)[:, :1].any()
        for a, b in zip(back.split([32, 48]), expected.split([32, 48]), strict=True)
    ]
    assert not any(changed)  # the first token is whole
    for span in cold.token_spans:
        part = cut[span.offset : span.offset + span.heads * 4 * span.token_bytes].view(span.heads, 4, span.token_bytes)
        assert not part[:, 1:].any()


@pytest.mark.parametrize(("kind", "times"), [("fp8", 1.97), ("int8", 1.81), ("int4", 3.3)])
def test_a_tier_of_the_same_bytes_holds_so_many_times_as_many_blocks(kind, times):
    layers = [LayerShape(3, 64, 64)] * 30  # SmolLM2-135M
    cold = ColdFormat(kind, layers, 32, torch.bfloat16)
    assert block_bytes(layers, 32, torch.bfloat16) / cold.block_bytes > times
    assert cold.block_bytes % PAGE_BYTES == 0  # disks read it past the page cache


# -- three codecs, one record ----------------------------------------------------------------------------------------------


def assert_agrees(kind: str, layers, chunk_size: int, dtype: torch.dtype, make_copies) -> None:
    gpu, cold = make_stores(kind, layers, chunk_size, dtype)
    fill(gpu, 4)
    cold.storage.fill_(0xAB)  # what was there before
    out, in_ = make_copies(gpu, cold)
    copies = [swap_out(0, 2), swap_out(2, 0)._replace(num_tokens=max(1, chunk_size - 2))]
    expected = [cold.format.encode(gpu.storage[copy.source], copy.num_tokens) for copy in copies]
    out(copies)
    blocks = []
    for copy, record in zip(copies, expected, strict=True):
        exact = torch.empty_like(gpu.storage[0])
        cold.format.decode(record, exact, range(len(layers)))
        blocks.append(exact)
        for part in (part for parts in cold.format.layers for part in parts):
            payload = slice(part.payload, part.payload + part.heads * chunk_size * cold.format.row_bytes(part.dim))
            assert torch.equal(cold.storage[copy.target, payload], record[payload])
    for layer in range(len(layers)):
        gpu.storage[1] = 7.0
        in_([swap_in(2, 1)], layer)
        columns = gpu.layer_slices[layer]
        assert torch.equal(gpu.storage[1, columns], blocks[0][columns])
        assert (gpu.storage[1, : columns.start] == 7.0).all()
        assert (gpu.storage[1, columns.stop :] == 7.0).all()
        in_([swap_in(0, 1)], layer)
        assert torch.equal(gpu.storage[1, columns], blocks[1][columns])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", SHAPES)
def test_the_cpp_kernel_agrees_with_the_reference(kind, dtype, layers):
    def make(gpu, cold):
        copies = ColdCopies(load_library(), gpu, cold)
        return (
            lambda pairs: [copies.swap_out(copy) for copy in pairs],
            lambda pairs, layer: [copies.swap_in(copy, layer) for copy in pairs],
        )

    for chunk_size in (1, 5, 32):
        assert_agrees(kind, layers, chunk_size, dtype, make)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", SHAPES)
def test_the_triton_kernel_agrees_with_the_reference(kind, dtype, layers):
    from engine.executor.tiers.cold_copy_kernel import ColdDecoder, ColdEncoder

    def make(gpu, cold):
        encoder, decoder = ColdEncoder(cold.format), ColdDecoder(gpu, cold.format)
        everything = slice(0, gpu.storage.shape[1])
        return (
            lambda pairs: encoder.copy(cold.storage, gpu.storage, pairs, everything),
            lambda pairs, layer: decoder.copy(
                gpu.storage, cold.storage, pairs, columns_of(gpu, range(layer, layer + 1))
            ),
        )

    assert_agrees(kind, layers, 5, dtype, make)


def test_without_a_compiler_the_reference_serves_and_the_log_says_so(monkeypatch, caplog):
    def fail() -> None:
        raise KernelBuildError("no C++ compiler")

    monkeypatch.setattr(cold_copies, "load_library", fail)
    gpu, cold = make_stores("int8", [LayerShape(1, 4, 4)], 2, torch.float32)
    copies = make_cold_copies(gpu, cold)
    assert isinstance(copies, ReferenceColdCopies)
    assert "no C++ compiler" in caplog.text
    fill(gpu, 5)
    copies.swap_out(swap_out(0, 1))
    copies.swap_in(swap_in(1, 2), 0)
    assert torch.equal(cold.storage[1], cold.format.encode(gpu.storage[2]))
