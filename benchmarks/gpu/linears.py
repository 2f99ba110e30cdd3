# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that Python knows.
"""Matrix products of decode steps: few rows by each weight of a layer, which is reading the weight.

torch's own (cuBLAS) beside a kernel of Triton in several tilings. Figures to decide by whether such a kernel pays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from setting import Setting, Shape
from timing import measure
from tqdm import tqdm

from engine.attention.device_health import check_device


@dataclass(frozen=True, slots=True)
class Tile:
    """rows: of the inputs, padded. outputs, inputs: of the weight, in a turn. parts: that the inputs are cut into.

    weights_first: multiplies the weight by the inputs, which Hopper's wide instruction wants.
    """

    rows: int
    outputs: int
    inputs: int
    parts: int
    warps: int
    stages: int
    weights_first: bool


def tiles(num_rows: int) -> list[Tile]:
    rows = max(16, 1 << (num_rows - 1).bit_length())
    if rows == 16:
        narrow = [Tile(16, n, k, 1, 4, s, False) for n, k, s in product((16, 32, 64), (128, 256), (4, 6))]
        wide = [Tile(16, 64, k, p, 4, 5, True) for k, p in product((64, 128), (1, 2, 4))]
        return narrow + wide
    return [Tile(rows, n, k, p, 4, s, True) for n, (k, s), p in product((64, 128), ((64, 6), (128, 4)), (1, 2, 4))]


@triton.jit
def _linear_kernel(
    out,
    x,
    weight,
    num_rows,
    num_outputs,
    num_inputs,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    """OUTPUTS columns of all rows, over a part of the inputs."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(1)
    m = tl.arange(0, ROWS)
    length = tl.cdiv(tl.cdiv(num_inputs, PARTS), INPUTS) * INPUTS
    begin = part * length
    w_rows = weight + n.to(tl.int64) * num_inputs
    x_rows = x + m * num_inputs
    is_row, is_output = m < num_rows, n < num_outputs
    if WEIGHTS_FIRST:
        acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(begin, tl.minimum(begin + length, num_inputs), INPUTS):
        k = start + tl.arange(0, INPUTS)
        if WEIGHTS_FIRST:
            w = tl.load(w_rows[:, None] + k[None, :], mask=is_output[:, None], other=0.0)
            a = tl.load(x_rows[None, :] + k[:, None], mask=is_row[None, :], other=0.0)
            acc = tl.dot(w, a, acc)
        else:
            w = tl.load(w_rows[None, :] + k[:, None], mask=is_output[None, :], other=0.0)
            a = tl.load(x_rows[:, None] + k[None, :], mask=is_row[:, None], other=0.0)
            acc = tl.dot(a, w, acc)
    rows = out + (part * num_rows + m) * num_outputs
    value = acc.to(out.dtype.element_ty)
    if WEIGHTS_FIRST:
        tl.store(rows[None, :] + n[:, None], value, mask=is_row[None, :] & is_output[:, None])
    else:
        tl.store(rows[:, None] + n[None, :], value, mask=is_row[:, None] & is_output[None, :])


def linear(x: torch.Tensor, weight: torch.Tensor, tile: Tile) -> torch.Tensor:
    """x: [rows, inputs]. weight: [outputs, inputs]."""
    (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
    is_cut = tile.parts > 1
    shape = (tile.parts, num_rows, num_outputs) if is_cut else (num_rows, num_outputs)
    out = torch.empty(shape, dtype=torch.float32 if is_cut else x.dtype, device=x.device)
    _linear_kernel[(triton.cdiv(num_outputs, tile.outputs), tile.parts)](
        out,
        x,
        weight,
        num_rows,
        num_outputs,
        num_inputs,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        PARTS=tile.parts,
        WEIGHTS_FIRST=tile.weights_first,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out.sum(0).to(x.dtype) if is_cut else out


def weights_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each weight that a decode step reads, as the engine joins them."""
    hidden, kv = int(shape.values["hidden_size"]), 2 * shape.num_kv_heads * shape.head_dim
    inner = int(shape.values.get("intermediate_size") or shape.values["ffn_dim"])
    return {
        "qkv": (shape.num_heads * shape.head_dim + kv, hidden),
        "o": (hidden, shape.num_heads * shape.head_dim),
        "up": (2 * inner if "intermediate_size" in shape.values else inner, hidden),
        "down": (hidden, inner),
        "head": (int(shape.values["vocab_size"]), hidden),
    }


def measure_linears(setting: Setting, roofs: dict[str, float]) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after each weight and number of rows."""
    rows: list[dict[str, Any]] = []
    shape = next(iter(setting.models.values()))
    cases = [(name, *size, n) for name, size in weights_of(shape).items() for n in setting.decode_batches]
    for name, num_outputs, num_inputs, num_rows in tqdm(cases, desc="linears", unit="weight"):
        rows.append({"weight": name, "rows": num_rows, **_measure(setting, roofs, num_outputs, num_inputs, num_rows)})
        yield rows


def _measure(
    setting: Setting, roofs: dict[str, float], num_outputs: int, num_inputs: int, num_rows: int
) -> dict[str, Any]:
    """In turns over copies of the weight that no cache holds all of."""
    size = num_outputs * num_inputs * setting.dtype.itemsize
    num_copies = 1 if setting.is_smoke else max(2, -(-(256 << 20) // size))
    generator = torch.Generator(setting.device).manual_seed(0)
    like = {"generator": generator, "device": setting.device, "dtype": setting.dtype}
    weights = [torch.randn(num_outputs, num_inputs, **like) for _ in range(num_copies)]
    x = torch.randn(num_rows, num_inputs, **like)
    expected = F.linear(x, weights[0]).float()
    wrong: dict[str, str] = {}
    calls: dict[str, Any] = {"torch": lambda: [F.linear(x, weight) for weight in weights]}
    candidates = tiles(num_rows)[: 2 if setting.is_smoke else None]
    for number, tile in enumerate(candidates):
        try:
            error = float((linear(x, weights[0], tile).float() - expected).abs().max() / expected.abs().max())
            if error > 2e-2:
                wrong[str(number)] = f"differs by {error}"
                continue
        except Exception as failure:  # whatever triton and the driver raise
            check_device(setting.device)
            wrong[str(number)] = " ".join(str(failure).split())[:150]
            continue
        calls[str(number)] = lambda tile=tile: [linear(x, weight, tile) for weight in weights]
    seconds = {
        key: value / num_copies for key, value in measure(calls, setting.device, min(3, setting.repeats)).items()
    }
    by_torch = seconds.pop("torch")
    best = sorted(seconds, key=lambda key: seconds[key])[:3]
    return {
        "mib": size / (1 << 20),
        "floor_us": size / roofs["copy_bytes_per_s"] * 1e6,
        "torch_us": by_torch * 1e6,
        "triton": [{"us": seconds[key] * 1e6, **asdict(candidates[int(key)])} for key in best],
        "wrong": wrong,
    }
