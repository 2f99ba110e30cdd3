# mypy: allow-untyped-defs, allow-incomplete-defs
# The arguments of kernels have no types that Python knows.
"""The copy kernels between a GPU's tier and records of the cold tiers in pinned host memory, see cold_format.

They convert on the way; a GPU reads and writes pinned memory in place. A program takes K or V of one head at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from engine.attention.protocol import to_device
from engine.core.plan import BlockCopy
from engine.executor.tiers.cold_format import LEAST_FP8, LEVELS, MIN_RANGE, TINY, TOP_EXPONENT, ColdFormat
from engine.executor.tiers.kv_store import KVStore

# They compute as well as copy, so that it takes many programs to keep the bus busy.
NUM_PROGRAMS = 32
_MIN_RANGE, _TINY, _LEAST_FP8 = tl.constexpr(MIN_RANGE), tl.constexpr(TINY), tl.constexpr(LEAST_FP8)
_TOP_EXPONENT = tl.constexpr(TOP_EXPONENT)


class ColdEncoder:
    """From the GPU tier to records; see BlockCopier. Whole blocks only."""

    def __init__(self, cold_format: ColdFormat) -> None:
        self._format = cold_format
        self._units = _Units(cold_format, range(len(cold_format.layers)))

    def copy(self, target: torch.Tensor, source: torch.Tensor, copies: Sequence[BlockCopy], columns: slice) -> None:
        """See BlockCopier."""
        size = self._format.chunk_size
        tokens = [size if copy.num_tokens is None else copy.num_tokens for copy in copies]
        self._units.launch(_encode_kernel, source, target, copies, tokens, source.device)


class ColdDecoder:
    """From records to the GPU tier; see BlockCopier. Columns are those of whole layers."""

    def __init__(self, gpu: KVStore, cold_format: ColdFormat) -> None:
        self._format = cold_format
        self._layer_slices = gpu.layer_slices
        self._units: dict[tuple[int, int], _Units] = {}

    def copy(self, target: torch.Tensor, source: torch.Tensor, copies: Sequence[BlockCopy], columns: slice) -> None:
        """See BlockCopier."""
        key = columns.start, columns.stop
        if key not in self._units:
            parts = enumerate(self._layer_slices)
            layers = [layer for layer, part in parts if columns.start <= part.start < columns.stop]
            self._units[key] = _Units(self._format, layers)
        tokens = [self._format.chunk_size] * len(copies)
        self._units[key].launch(_decode_kernel, target, source, copies, tokens, target.device)


class _Units:
    """K and V of the heads of some layers: what a kernel is launched for."""

    def __init__(self, cold_format: ColdFormat, layers: Sequence[int]) -> None:
        units = torch.from_numpy(cold_format.units(layers))
        # One launch for K and one for V; a layer with other shapes than the rest is a launch of its own.
        self._launches = [
            (bool(is_key), int(dim), units[(units[:, 0] == is_key) & (units[:, 1] == dim)][:, 2:].contiguous())
            for is_key, dim in sorted({(int(row[0]), int(row[1])) for row in units.tolist()})
        ]
        self._format = cold_format
        self._on_device: dict[torch.device, list[torch.Tensor]] = {}

    def launch(
        self,
        kernel,
        exact: torch.Tensor,
        cold: torch.Tensor,
        copies: Sequence[BlockCopy],
        tokens: Sequence[int],
        device: torch.device,
    ) -> None:
        """exact, cold: the storages of the GPU tier and of the records. tokens: valid ones of each copy."""
        if device not in self._on_device:
            self._on_device[device] = [to_device(units, device) for _, _, units in self._launches]
        rows = torch.tensor(
            [(copy.target, copy.source, num) for copy, num in zip(copies, tokens, strict=True)], dtype=torch.int64
        )
        pairs = to_device(rows, device)
        chunk_size = self._format.chunk_size
        for (is_key, dim, _), units in zip(self._launches, self._on_device[device], strict=True):
            half = self._format.row_bytes(dim) if self._format.kind == "int4" else dim
            with torch.cuda.device_of(exact):  # triton launches on the current one
                kernel[(min(NUM_PROGRAMS, len(copies) * len(units)),)](
                    exact,
                    cold,
                    cold.view(exact.dtype),
                    pairs,
                    units,
                    len(copies),
                    len(units),
                    exact.stride(0),
                    cold.stride(0),
                    DIM=dim,
                    HALF=half,
                    CHUNK=chunk_size,
                    IS_KEY=is_key,
                    LEVELS=LEVELS.get(self._format.kind, 0),
                    TOKENS=triton.next_power_of_2(chunk_size),
                    COLUMNS=triton.next_power_of_2(half),
                    ITEM_BYTES=exact.dtype.itemsize,
                    # The reference rounds after each operation, so the kernel must not join two of them.
                    enable_fp_fusion=False,
                )


@triton.jit
def _tile(unit, units, pairs, num_units):
    """Which copy and which head: target, source, tokens, elements, scales, payload."""
    pair, row = pairs + (unit // num_units) * 3, units + (unit % num_units) * 3
    return tl.load(pair), tl.load(pair + 1), tl.load(pair + 2), tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def _numbers(values, low, high, LEVELS: tl.constexpr):
    """int32 0 to LEVELS, as the reference has them."""
    is_flat = (high - low <= tl.maximum(tl.abs(low), tl.abs(high)) * _MIN_RANGE) | (high - low < _TINY)
    inverse = tl.where(is_flat, 0.0, tl.div_rn(LEVELS * 1.0 + low * 0.0, tl.where(is_flat, 1.0, high - low)))
    number = (values - low) * inverse + 0.5
    number = tl.minimum(tl.maximum(number, 0.0), LEVELS * 1.0)
    return number.to(tl.int32)


@triton.jit
def _finite_min(values, axis: tl.constexpr):
    """0 if there is none."""
    least = tl.min(values, axis, keep_dims=True)
    return tl.where(least == float("inf"), 0.0, least) + 0.0  # of zeros, the positive one


@triton.jit
def _finite_max(values, axis: tl.constexpr):
    """0 if there is none."""
    greatest = tl.max(values, axis, keep_dims=True)
    return tl.where(greatest == float("-inf"), 0.0, greatest) + 0.0


@triton.jit
def _flat_high(low, high):
    is_flat = (high - low <= tl.maximum(tl.abs(low), tl.abs(high)) * _MIN_RANGE) | (high - low < _TINY)
    return tl.where(is_flat, low, high)


@triton.jit
def _power_of_two(exponent):
    """For exponents of -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_copies", "num_units"])
def _encode_kernel(
    exact, cold, cold_elements, pairs, units, num_copies, num_units, exact_stride, cold_stride,
    DIM: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr, IS_KEY: tl.constexpr, LEVELS: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, ITEM_BYTES: tl.constexpr,
):  # fmt: skip
    """A program encodes every so many-th head. LEVELS: 255 of int8, 15 of int4, 0 of fp8."""
    token, column = tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    for unit in range(tl.program_id(0), num_copies * num_units, tl.num_programs(0)):
        target, source, num_tokens, elements, scales, payload = _tile(unit, units, pairs, num_units)
        block = exact + source * exact_stride + elements
        record = cold + target * cold_stride
        offsets = token[:, None] * DIM + column[None, :]
        inside = (token[:, None] < CHUNK) & (column[None, :] < HALF)
        valid = inside & (token[:, None] < num_tokens)
        values = tl.load(block + offsets, mask=valid, other=0.0).to(tl.float32)
        to = record + payload + token[:, None] * HALF + column[None, :]
        if LEVELS == 0:
            greatest = tl.max(tl.max(tl.abs(values), 1), 0)
            is_zero = greatest < _LEAST_FP8
            exponent = tl.minimum((greatest.to(tl.int32, bitcast=True) + (1 << 19)) >> 23, 254) - 127
            exponent = tl.where(is_zero, 0, exponent)
            tl.store(record + scales, exponent.to(tl.uint8))
            shift = _TOP_EXPONENT - exponent
            first = shift // 2
            scaled = tl.where(is_zero, 0.0, values * _power_of_two(first) * _power_of_two(shift - first))
            bits = scaled.to(tl.int32, bitcast=True)
            magnitude, sign = bits & 0x7FFFFFFF, (bits >> 24) & 0x80
            normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
            small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
            number = sign | tl.where(magnitude < (121 << 23), small, normal)
            tl.store(to, tl.where(valid, number, 0).to(tl.uint8), mask=inside)
        else:
            bounds = cold_elements + (target * cold_stride + scales) // ITEM_BYTES
            is_second = valid & (column[None, :] + HALF < DIM)
            others = tl.load(block + offsets + HALF, mask=is_second, other=0.0).to(tl.float32)
            axis: tl.constexpr = 0 if IS_KEY else 1
            low = _finite_min(tl.where(valid, values, float("inf")), axis)
            high = _finite_max(tl.where(valid, values, float("-inf")), axis)
            low2 = _finite_min(tl.where(is_second, others, float("inf")), axis)
            high2 = _finite_max(tl.where(is_second, others, float("-inf")), axis)
            if IS_KEY:
                at = bounds + column[None, :]
                tl.store(at, low.to(cold_elements.dtype.element_ty), mask=column[None, :] < HALF)
                tl.store(
                    at + DIM, _flat_high(low, high).to(cold_elements.dtype.element_ty), mask=column[None, :] < HALF
                )
                if HALF < DIM:
                    mask = column[None, :] + HALF < DIM
                    tl.store(at + HALF, low2.to(cold_elements.dtype.element_ty), mask=mask)
                    high_at = at + DIM + HALF
                    tl.store(high_at, _flat_high(low2, high2).to(cold_elements.dtype.element_ty), mask=mask)
            else:
                if HALF < DIM:
                    low, high = tl.minimum(low, low2), tl.maximum(high, high2)
                low2, high2 = low, high
                at = bounds + 2 * token[:, None]
                is_valid = token[:, None] < num_tokens
                mask = token[:, None] < CHUNK
                tl.store(at, tl.where(is_valid, low, 0.0).to(cold_elements.dtype.element_ty), mask=mask)
                high_kept = tl.where(is_valid, _flat_high(low, high), 0.0)
                tl.store(at + 1, high_kept.to(cold_elements.dtype.element_ty), mask=mask)
            number = tl.where(valid, _numbers(values, low, high, LEVELS), 0)
            if HALF < DIM:
                number = number | (tl.where(is_second, _numbers(others, low2, high2, LEVELS), 0) << 4)
            tl.store(to, number.to(tl.uint8), mask=inside)


@triton.jit
def _narrow(value, KIND: tl.constexpr):
    """Rounded to the nearest; Triton's interpreter cuts bfloat16 off."""
    if KIND == tl.bfloat16:  # noqa: SIM300 (a constant of the launch)
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(KIND)


@triton.jit(do_not_specialize=["num_copies", "num_units"])
def _decode_kernel(
    exact, cold, cold_elements, pairs, units, num_copies, num_units, exact_stride, cold_stride,
    DIM: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr, IS_KEY: tl.constexpr, LEVELS: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, ITEM_BYTES: tl.constexpr,
):  # fmt: skip
    """A program decodes every so many-th head; all of its tokens."""
    token, column = tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    for unit in range(tl.program_id(0), num_copies * num_units, tl.num_programs(0)):
        target, source, _, elements, scales, payload = _tile(unit, units, pairs, num_units)
        block = exact + target * exact_stride + elements
        record = cold + source * cold_stride
        offsets = token[:, None] * DIM + column[None, :]
        inside = (token[:, None] < CHUNK) & (column[None, :] < HALF)
        number = tl.load(record + payload + token[:, None] * HALF + column[None, :], mask=inside, other=0).to(tl.int32)
        if LEVELS == 0:
            exponent = tl.load(record + scales).to(tl.int8, bitcast=True).to(tl.int32)
            magnitude, sign = number & 0x7F, (number & 0x80) << 24
            normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
            value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
            value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            shift = exponent - _TOP_EXPONENT
            first = shift // 2
            value = value * _power_of_two(first) * _power_of_two(shift - first)
            tl.store(block + offsets, _narrow(value, exact.dtype.element_ty), mask=inside)
        else:
            bounds = cold_elements + (source * cold_stride + scales) // ITEM_BYTES
            if IS_KEY:
                mask = column[None, :] < HALF
                low = tl.load(bounds + column[None, :], mask=mask, other=0.0).to(tl.float32)
                high = tl.load(bounds + DIM + column[None, :], mask=mask, other=0.0).to(tl.float32)
            else:
                mask = token[:, None] < CHUNK
                low = tl.load(bounds + 2 * token[:, None], mask=mask, other=0.0).to(tl.float32)
                high = tl.load(bounds + 2 * token[:, None] + 1, mask=mask, other=0.0).to(tl.float32)
            first_number = number & 15 if HALF < DIM or LEVELS == 15 else number
            share = tl.div_rn(first_number.to(tl.float32), LEVELS * 1.0 + number * 0.0)
            value = low * (1.0 - share) + high * share
            tl.store(block + offsets, _narrow(value, exact.dtype.element_ty), mask=inside)
            if HALF < DIM:
                mask2 = inside & (column[None, :] + HALF < DIM)
                if IS_KEY:
                    second = column[None, :] + HALF
                    low = tl.load(bounds + second, mask=second < DIM, other=0.0).to(tl.float32)
                    high = tl.load(bounds + DIM + second, mask=second < DIM, other=0.0).to(tl.float32)
                share = tl.div_rn((number >> 4).to(tl.float32), LEVELS * 1.0 + number * 0.0)
                value = low * (1.0 - share) + high * share
                tl.store(block + offsets + HALF, _narrow(value, exact.dtype.element_ty), mask=mask2)
