"""The kernel for quantised weights: against exact sums, for every instruction set that this machine has."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

from engine.executor import block_kernel
from engine.executor.block_kernel import BlockWeight, instruction_set, load_built_for
from engine.kernel_build import ISA_FLAGS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")

# Of a product, in relation to its length: what rounding inputs and float sums may make of it.
INPUT_LOSS = 1e-2
DTYPES = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Features that fill no block, no panel, no tile; and those that do.
SHAPES = [(1, 1), (31, 3), (32, 16), (70, 37), (192, 100)]


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Those that this processor can run, down to none that are named."""
    name, flags = instruction_set()
    sets = {"DEFAULT": (), name: flags}
    return sets | ({"AVX2": ISA_FLAGS["AVX2"]} if name.startswith("AVX") else {})


@pytest.fixture(params=sorted(instruction_sets()))
def built_for(request, monkeypatch):
    library = load_built_for(request.param, instruction_sets()[request.param])
    monkeypatch.setattr(block_kernel, "load_library", lambda: library)
    return request.param


@pytest.mark.parametrize("num_terms", [1, 2])
@pytest.mark.parametrize("num_bits", [8, 4])
@torch.inference_mode()
def test_products_are_those_of_the_rounded_weight(num_bits, num_terms, built_for):
    for index, ((in_features, out_features), dtype) in enumerate(
        (shape, dtype) for shape in SHAPES for dtype in DTYPES
    ):
        torch.manual_seed(index)
        weight, bias = torch.randn(out_features, in_features), torch.randn(out_features)
        packed = BlockWeight(weight.to(dtype), bias.to(dtype) if index % 2 else None, num_bits, num_terms)
        x = torch.randn(2, 9, in_features).to(dtype)
        exact = nn.functional.linear(
            x.double(), packed.unpack().double(), bias.to(dtype).double() if index % 2 else None
        )
        out = packed.multiply(x)
        assert out.dtype == dtype
        assert (out.double() - exact).norm() <= (INPUT_LOSS + DTYPES[dtype]) * exact.norm()


@pytest.mark.parametrize("num_bits", [8, 4])
@torch.inference_mode()
def test_a_value_far_beyond_the_others_of_its_row_leaves_them_their_precision(num_bits, built_for):
    torch.manual_seed(0)
    weight = torch.randn(20, 96)
    weight[:, 40] = 0  # so that only what it does to its neighbours shows
    x = torch.randn(9, 96)
    x[::2, 40] *= 300
    errors = []
    for num_terms in (1, 2):
        packed = BlockWeight(weight, None, num_bits, num_terms)
        exact = x.double() @ packed.unpack().double().T
        errors.append((packed.multiply(x) - exact).norm(dim=1) / exact.norm(dim=1))
    assert (errors[0][::2] > 3e-2).all()
    assert (errors[1] < INPUT_LOSS).all()
    assert torch.equal(errors[0][1::2], errors[1][1::2])


@pytest.mark.parametrize(("num_bits", "loss"), [(8, 0.008), (4, 0.1)])
@torch.inference_mode()
def test_a_weight_is_rounded_within_its_block(num_bits, loss, built_for):
    torch.manual_seed(0)
    weight = torch.randn(40, 100)
    weight[:, :32] *= 1e4  # would take the precision of all, with one scale for them
    weight[3, 40:] = 0
    weight[4] *= 1e-10
    blocks = [weight.split(32, dim=1), BlockWeight(weight, None, num_bits, 1).unpack().split(32, dim=1)]
    for before, after in zip(*blocks, strict=True):
        rows = before.norm(dim=1) > 0
        errors = (after - before).norm(dim=1)[rows] / before.norm(dim=1)[rows]
        assert errors.max() <= 1.5 * loss
        assert errors.mean() <= loss
        assert (after[~rows] == 0).all()


@pytest.mark.parametrize("num_bits", [8, 4])
@torch.inference_mode()
def test_what_fits_the_integers_is_exact(num_bits, built_for):
    """Among them the largest sums: a kernel that adds in 16 bits would have too few."""
    limit = 2 ** (num_bits - 1) - 1
    weight = torch.randint(-limit, limit + 1, (20, 64)).float()
    weight[:, ::7], weight[1], weight[2] = limit, limit, -limit
    for num_terms in (1, 2):
        packed = BlockWeight(weight, None, num_bits, num_terms)
        assert torch.equal(packed.unpack(), weight)
        x = torch.randint(-127, 128, (8, 64)).float()
        x[:, ::5], x[1], x[2] = 127, 127, -127
        assert torch.equal(packed.multiply(x), x @ weight.T)


@pytest.mark.parametrize(("num_bits", "num_terms"), [(8, 1), (8, 2), (4, 1), (4, 2)])
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others(num_bits, num_terms, built_for):
    torch.manual_seed(0)
    packed = BlockWeight(torch.randn(40, 70), torch.randn(40), num_bits, num_terms)
    x = torch.randn(130, 70)
    x[3] *= 1e4
    x[5] = 0
    x[6, 3] = 1e3
    together = packed.multiply(x)
    assert torch.equal(together[5], packed._bias)
    for first, last in [(0, 1), (3, 4), (6, 8), (5, 11), (3, 20), (1, 64), (60, 130)]:
        assert torch.equal(packed.multiply(x[first:last]), together[first:last])
    x[7, 0], x[8, 69] = torch.nan, torch.inf
    assert not packed.multiply(x)[7:9].isfinite().any()
    others = [row for row in range(130) if row not in (7, 8)]
    assert torch.equal(packed.multiply(x)[others], together[others])
    assert packed.multiply(x[:0]).shape == (0, 40)


@torch.inference_mode()
def test_inputs_of_any_strides_and_threads_of_any_number():
    torch.manual_seed(0)
    packed = BlockWeight(torch.randn(100, 64), torch.randn(100), 8, 2)
    x = torch.randn(3, 64, 50).transpose(1, 2)
    expected = packed.multiply(x.contiguous())
    assert torch.equal(packed.multiply(x), expected)
    num_threads = torch.get_num_threads()
    try:
        for other in (1, 2, 3):
            torch.set_num_threads(other)
            assert torch.equal(packed.multiply(x), expected)
    finally:
        torch.set_num_threads(num_threads)
    with pytest.raises(ValueError, match="64"):
        packed.multiply(torch.randn(2, 32))


@torch.inference_mode()
def test_it_can_be_copied():
    packed = BlockWeight(torch.randn(8, 64), torch.randn(8), 4, 1)
    x = torch.randn(3, 64)
    expected = packed.multiply(x)
    other = copy.deepcopy(packed)
    del packed
    assert torch.equal(other.multiply(x), expected)
    assert other.num_bytes == 16 * 64 // 2 + 16 * 2 * 2
