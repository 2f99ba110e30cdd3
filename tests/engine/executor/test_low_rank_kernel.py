"""The kernel that adds adapters to a few rows, against torch's operations."""

from __future__ import annotations

import pytest
import torch

from engine.executor.lora.adapters import Adapters
from engine.executor.lora.layers import AdaptedLayers, AdaptedRows, Change, RunningStep
from engine.executor.lora.low_rank_kernel import MAX_ROWS, load_kernel

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernel():
    return load_kernel(CPU, torch.float32) or pytest.skip("no compiler")


def random_change(generator, rank, in_features, out_features):
    a, b = (torch.randn(size, generator=generator) for size in ((rank, in_features), (rank, out_features)))
    return Change(a / in_features**0.5, b, 0.75)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 192), (33, 47), (5, 3), (64, 100)])
def test_it_adds_what_torch_adds(kernel, dtype, in_features, out_features):
    """Adapters of several ranks for 1 to 9 rows each, rows with none, and an output that is a part of a wider one."""
    generator = torch.Generator().manual_seed(in_features)
    order = torch.randperm(20, generator=generator)
    x = torch.randn(20, in_features, generator=generator).to(dtype)
    wide = torch.randn(20, out_features + 16, generator=generator).to(dtype)
    step, expected = RunningStep(), wide.float()
    step.kernel = kernel
    parts, start = [], 0
    for rank, num_rows in ((1, 1), (8, 2), (7, 3), (32, 9)):
        rows = order[start : start + num_rows]
        start += num_rows
        change = random_change(generator, rank, in_features, out_features)
        change = Change(change.a.to(dtype), change.b.to(dtype), change.scale)
        parts.append(AdaptedRows({"layer": change}, rows, is_few=True))
        added = change.scale * (x[rows].float() @ change.a.float().T) @ change.b.float()
        expected[rows, :out_features] += added
    assert start < 20
    step.parts = parts
    step.add("another layer", wide[:, :out_features], x)
    step.add("layer", wide[:, :out_features], x)
    torch.testing.assert_close(wide.float(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    assert torch.equal(wide[order[start:]], expected[order[start:]].to(dtype)), "rows without an adapter changed"


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([4, 0])])
def test_without_it_torch_adds_the_same(rows):
    generator = torch.Generator().manual_seed(0)
    change = random_change(generator, 4, 12, 10)
    x, out = torch.randn(6, 12, generator=generator), torch.randn(1, 6, 10, generator=generator)
    expected = out[0].clone()
    expected[rows] += change.scale * (x[rows] @ change.a.T) @ change.b
    step = RunningStep()
    step.parts = [AdaptedRows({"layer": change}, rows, is_few=False)]
    step.add("layer", out.view(-1, 10), x)
    torch.testing.assert_close(out[0], expected)


def test_rows_that_are_not_there_are_an_error(kernel):
    change = random_change(torch.Generator().manual_seed(0), 4, 8, 8)
    for row in (-1, 2):
        with pytest.raises(RuntimeError, match=f"no row {row} among 2"):
            kernel(torch.zeros(2, 8), torch.zeros(2, 8), [change.a], [change.b], [1.0], [torch.tensor([row])])


def test_few_rows_of_an_adapter_are_for_the_kernel(kernel):
    """A decode, a prompt that is too long for it, and a segment of the model alone."""
    adapters = Adapters(AdaptedLayers({}, {}, RunningStep()), CPU, torch.float32, 8)
    segments = torch.tensor([[0, 1], [1, MAX_ROWS + 1], [MAX_ROWS + 2, 4], [MAX_ROWS + 6, 1]]).numpy()
    few, many = {}, {}
    first, second = adapters.rows_of([few, many, None, few], segments, torch.from_numpy)
    assert first.is_few
    assert first.rows.tolist() == [0, MAX_ROWS + 6]
    assert not second.is_few
    assert second.rows == slice(1, MAX_ROWS + 2)
