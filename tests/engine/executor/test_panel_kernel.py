"""Rows times a weight in oneDNN's layout: exact, each row by itself, and only if the layout is the one that is read."""

from __future__ import annotations

import pytest
import torch

from engine.errors import KernelBuildError
from engine.executor import packed_linear, panel_kernel
from engine.executor.packed_linear import OneDnnWeight
from engine.executor.panel_kernel import PanelWeight, load_built_for
from engine.kernel_build import ISA_FLAGS


def pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, packed_linear.NUM_ROWS_HINT)


def integers(limit: int, *size: int) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, size).float()


def has_kernel(dtype: torch.dtype) -> bool:
    weight = integers(2, 64, 64).to(dtype)
    try:
        PanelWeight(pack(weight), weight, None)
    except (KernelBuildError, RuntimeError, AttributeError):
        return False
    return True


NEEDS_KERNEL = pytest.mark.skipif(not has_kernel(torch.float32), reason="no kernel for this processor")
pytestmark = NEEDS_KERNEL
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not has_kernel(torch.bfloat16), reason="a processor without bfloat16"),
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
# The last one's panels are multiplied in several blocks, however many rows there are.
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (24, 96), (130, 77), (3, 5), (65, 2), (100, 5000)])
def test_products_are_exact(outputs, inputs, bias, dtype):
    torch.manual_seed(outputs)
    # Sums that are exact in float32; those of the longest rows are rounded once, to bfloat16.
    weight, added = integers(2, outputs, inputs), integers(9, outputs) if bias else None
    packed = PanelWeight(pack(weight.to(dtype)), weight.to(dtype), None if added is None else added.to(dtype))
    # Of 800 rows with one panel, the last chunk of 18 is empty, because chunks are rounded up (with AVX-512).
    for num_rows in (0, 1, 2, 3, 5, 6, 7, 13, 19, 25, 96, 97, 200, 800):
        x = integers(3, num_rows, inputs)
        expected = x @ weight.T + (0 if added is None else added)
        assert torch.equal(packed.multiply(x.to(dtype)), expected.to(dtype)), num_rows


def test_the_build_for_avx2_is_exact_too(monkeypatch):
    if torch.backends.cpu.get_cpu_capability() not in ISA_FLAGS:
        pytest.skip("a processor without AVX2")
    monkeypatch.setattr(panel_kernel, "_kernel_for", lambda dtype: load_built_for("AVX2", ISA_FLAGS["AVX2"]))
    torch.manual_seed(0)
    weight = integers(2, 130, 77)
    packed = PanelWeight(pack(weight), weight, None)
    for num_rows in (1, 2, 3, 7, 64, 800):
        x = integers(3, num_rows, 77)
        assert torch.equal(packed.multiply(x), x @ weight.T), num_rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    """Nor on how many threads share the outputs."""
    torch.manual_seed(1)
    weight, x = torch.randn(576, 1200).to(dtype), torch.randn(130, 1200).to(dtype)
    packed = PanelWeight(pack(weight), weight, None)
    torch.set_num_threads(2)
    try:
        together = packed.multiply(x)
    finally:
        torch.set_num_threads(1)
    for count in (1, 2, 5, 7, 13, 100):
        for first in range(0, 130 - count, 9):
            assert torch.equal(packed.multiply(x[first : first + count]), together[first : first + count])
    x[3] = float("nan")
    others = torch.arange(130) != 3
    assert torch.equal(packed.multiply(x)[others], together[others])
    assert packed.multiply(x)[3].isnan().all()


def test_inputs_of_any_layout():
    weight, x = integers(2, 64, 24), integers(3, 24, 2, 3)
    packed = PanelWeight(pack(weight), weight, None)
    assert torch.equal(packed.multiply(x.permute(1, 2, 0)), x.permute(1, 2, 0) @ weight.T)
    for wrong in (x, x.permute(1, 2, 0).double()):
        with pytest.raises(ValueError, match="an input of"):
            packed.multiply(wrong)


def test_another_layout_is_noticed(monkeypatch):
    """oneDNN may choose one that differs in where numbers lie, or in its size; then it multiplies all rows itself."""
    weight = torch.randn(128, 64)
    with pytest.raises(KernelBuildError, match="wrongly"):
        PanelWeight(pack(weight.flip(0)), weight, None)
    with pytest.raises(KernelBuildError, match="another way"):
        PanelWeight(pack(weight[:64]), weight, None)
    x = torch.randn(3, 64)
    monkeypatch.setattr(panel_kernel, "PANEL_LEN", 48)
    own = OneDnnWeight(weight, None)
    assert own.panels is None
    torch.testing.assert_close(own.multiply(x), x @ weight.T)


def test_many_rows_are_left_to_units_for_them(monkeypatch):
    monkeypatch.setattr(panel_kernel, "max_rows", lambda dtype: 16)
    weight = torch.randn(128, 64)
    packed = OneDnnWeight(weight, None)
    assert packed.panels is not None
    seen = []
    multiply = packed.panels.multiply
    monkeypatch.setattr(packed.panels, "multiply", lambda x: seen.append(x.shape[1]) or multiply(x))
    for num_rows in (1, 16, 17):
        x = torch.randn(1, num_rows, 64)
        torch.testing.assert_close(packed.multiply(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert seen == [1, 16]


def test_units_that_multiply_many_rows_at_once_get_them(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert panel_kernel.max_rows(torch.bfloat16) == panel_kernel.MAX_ROWS_WITH_AMX
    assert panel_kernel.max_rows(torch.float32) > 1e6
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert panel_kernel.max_rows(torch.bfloat16) > 1e6
