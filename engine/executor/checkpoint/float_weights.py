"""Weights of floats of 8 or 4 bits with a scale for each block, and of 8-bit integers that are held the same way.

fp8      float8 or int8, one a byte
fp4      two in a byte, the first in its low half: sign, exponent (2 bits), fraction (1 bit)
codes    two in a byte, the first in its high half: places of a table that is held beside them (bitsandbytes)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.executor.checkpoint.weight_format import Block, WeightFormat, find_block, num_bits, spread

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# bitsandbytes: the scale of a row of 8-bit integers is its largest value, not that of one step.
INT8_LIMIT = 127


def read_scale(scale: torch.Tensor) -> torch.Tensor:
    """float32; of bytes, which are exponents of 2 (E8M0)."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def read_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n] as values [..., 2n], float32."""
    return _look_up(
        packed, torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], device=packed.device), (0, 4)
    )


def scaled_bytes(
    scale: str, blocks: Sequence[Block], *, values: str = "weight", zero_point: str = "weight_zero_point"
) -> WeightFormat:
    """Numbers of 8 bits.

    scale, values, zero_point: the names of the parts.
    """

    def shape(parts: Mapping[str, Any]) -> tuple[int, ...]:
        weight = parts[values].get_shape()
        if not parts[values].get_dtype().startswith(("F8", "I8")):
            raise ValueError(f"it has a scale, but its numbers are {parts[values].get_dtype()}")
        find_block(weight, parts[scale].get_shape(), blocks)
        if zero_point in parts and parts[zero_point].get_shape() != parts[scale].get_shape():
            raise ValueError("its zero points do not fit its scales")
        return tuple(weight)

    def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        stored = parts[values]
        weight, block = stored.float(), find_block(stored.shape, parts[scale].shape, blocks)
        if zero_point in parts:
            weight.sub_(spread(parts[zero_point], weight.shape, block))
        return weight.mul_(spread(read_scale(parts[scale]), weight.shape, block))

    return WeightFormat(scale, (values, scale), shape, dequantize, optional=(zero_point,))


def packed_fp4(packed: str, global_scale: str | None, *, is_divisor: bool = False) -> WeightFormat:
    """Values [out_features, in_features / 2] with scales of groups of input features.

    packed: the part with the values.
    global_scale: the part with one more scale, of all; None = there is none.
    is_divisor: whether that is what the scales were multiplied with, and not what they are to be.
    """
    parts_needed = (packed, "weight_scale", *([global_scale] if global_scale else []))

    def groups(weight: Sequence[int], scales: Sequence[int]) -> Block:
        return find_block(weight, scales, [(1, 16 if global_scale else 32)])

    def shape(parts: Mapping[str, Any]) -> tuple[int, int]:
        out_features, half = parts[packed].get_shape()
        if parts[packed].get_dtype() != "U8":
            raise ValueError(f"its pairs of numbers are {parts[packed].get_dtype()}")
        groups((out_features, 2 * half), parts["weight_scale"].get_shape())
        return out_features, 2 * half

    def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values, scales = read_fp4(parts[packed]), read_scale(parts["weight_scale"])
        block = groups(values.shape, scales.shape)
        if global_scale:
            whole = parts[global_scale].float()
            scales = scales / whole if is_divisor else scales * whole
        return values.mul_(spread(scales, values.shape, block))

    return WeightFormat(global_scale or packed, parts_needed, shape, dequantize)


def mxfp4_experts(projection: str) -> WeightFormat:
    """Of gpt-oss: all experts of a layer [experts, out_features, groups, 16 bytes], which its model has transposed."""
    blocks, scales = f"{projection}_blocks", f"{projection}_scales"

    def shape(parts: Mapping[str, Any]) -> tuple[int, ...]:
        *grid, num_bytes = parts[blocks].get_shape()
        if list(parts[scales].get_shape()) != grid or num_bytes != 16:
            raise ValueError("its values and scales do not fit each other as groups of 32")
        num_experts, out_features, num_groups = grid
        return num_experts, num_groups * 32, out_features

    def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack(
            [
                read_fp4(values).mul_(read_scale(scale)[..., None]).flatten(-2).T
                for values, scale in zip(parts[blocks], parts[scales], strict=True)
            ]
        )

    return WeightFormat(blocks, (blocks, scales), shape, dequantize, target=projection)


def bitsandbytes_int8() -> WeightFormat:
    """A scale for each output feature."""

    def shape(parts: Mapping[str, Any]) -> tuple[int, ...]:
        weight = parts["weight"].get_shape()
        if parts["SCB"].get_shape() != weight[:1]:
            raise ValueError("it has not one scale for each output feature")
        if "weight_format" in parts and parts["weight_format"][...].item() != 0:
            raise ValueError("its rows are laid out for one kind of GPU")
        return tuple(weight)

    def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["weight"].float().mul_(parts["SCB"].float()[:, None] / INT8_LIMIT)

    return WeightFormat("SCB", ("weight", "SCB"), shape, dequantize, optional=("weight_format",))


def bitsandbytes_4bit(kind: str) -> WeightFormat:
    """Codes of a table, with a scale for each row of so many of them; the scales may be codes of another table.

    kind: nf4 or fp4.
    """
    state = f"weight.quant_state.bitsandbytes__{kind}"
    needed = ("weight", "weight.absmax", "weight.quant_map", state)

    def read_state(raw: torch.Tensor) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(bytes(raw.tolist()))
        return values

    def shape(parts: Mapping[str, Any]) -> tuple[int, ...]:
        if parts["weight.quant_map"].get_shape() != [16]:
            raise ValueError("its table has not 16 places")
        values = read_state(parts[state][...])
        num_values, absmax = math.prod(values["shape"]), parts["weight.absmax"]
        num_scales = math.prod(absmax.get_shape())
        _check_blocks("scales", num_scales, num_values, values["blocksize"])
        if _num_bytes(parts["weight"]) != -(-num_values // 2):
            raise ValueError(f"it has {_num_bytes(parts['weight'])} bytes for {num_values} numbers of 4 bits")
        if "weight.nested_absmax" in parts:
            nested, table = parts["weight.nested_absmax"], parts.get("weight.nested_quant_map")
            _check_blocks("scales of scales", math.prod(nested.get_shape()), num_scales, values["nested_blocksize"])
            if absmax.get_dtype() != "U8" or table is None or table.get_shape() != [256]:
                raise ValueError("its scales are no places in a table of 256")
        return tuple(values["shape"])

    def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values = read_state(parts[state])
        scales = parts["weight.absmax"]
        if "weight.nested_absmax" in parts:
            scales = parts["weight.nested_quant_map"].float()[scales.long()]
            nested = parts["weight.nested_absmax"].float().repeat_interleave(values["nested_blocksize"])
            scales = scales * nested[: len(scales)] + values["nested_offset"]
        # The bytes may be stored as numbers of another kind (bnb_4bit_quant_storage).
        weight = _look_up(
            parts["weight"].contiguous().flatten().view(torch.uint8), parts["weight.quant_map"].float(), (4, 0)
        )
        num_values = math.prod(values["shape"])  # the last byte may have one, the last row fewer than the others
        scales = scales.float().repeat_interleave(values["blocksize"])[:num_values]
        return weight[:num_values].mul_(scales).view(values["shape"])

    return WeightFormat(state, needed, shape, dequantize, optional=("weight.nested_absmax", "weight.nested_quant_map"))


def _check_blocks(name: str, num: int, num_values: int, size: Any) -> None:
    """Raises ValueError unless there is one number for each `size` values."""
    if not isinstance(size, int) or size < 1 or num != -(-num_values // size):
        raise ValueError(f"its {num} {name} do not fit {num_values} numbers in blocks of {size!r}")


def _num_bytes(part: Any) -> int:
    """Of a slice of a file."""
    return int(math.prod(part.get_shape())) * num_bits(part.get_dtype()) // 8


def _look_up(packed: torch.Tensor, table: torch.Tensor, shifts: tuple[int, int]) -> torch.Tensor:
    places = packed[..., None] >> torch.tensor(shifts, dtype=torch.uint8, device=packed.device) & 15
    return table[places.flatten(-2).int()]
