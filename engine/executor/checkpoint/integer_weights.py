"""Weights of integers: those of GPTQ, AWQ and compressed-tensors, several of them in a 32-bit word, or one in a byte.

A weight is (code - zero point) * scale, with a scale and a zero point for each group of input features of an output feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.executor.checkpoint.weight_format import Block, WeightFormat, find_block, spread

WORD = 32
# Widths that do not cross the end of a word.
NUMS_OF_BITS = (2, 4, 8)
# AWQ: which of eight columns each of the eight places of a word has.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Words [..., n] (int32) as their codes [..., n * 32 / num_bits] (uint8), the lowest bits first."""
    if words.dtype != torch.int32:
        raise ValueError(f"its words are {words.dtype} and not of 32 bits")
    octets = words.contiguous().view(torch.uint8)
    if num_bits == 8:
        return octets
    shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8, device=words.device)
    return (octets[..., None] >> shifts & (1 << num_bits) - 1).flatten(-2)


def find_num_bits(num_codes: int, num_words: int) -> int:
    """Bits of a code, from how many words so many codes take. Raises ValueError."""
    for num_bits in NUMS_OF_BITS:
        if num_words == -(-num_codes * num_bits // WORD):
            return num_bits
    raise ValueError(f"{num_words} words for {num_codes} numbers: only 2, 4 or 8 bits each can be read")


def gptq(*, is_v1: bool, group_size: int) -> WeightFormat:
    """Words run along the input features (qweight) and the output features (qzeros); all tensors are transposed.

    is_v1: whether zero points are stored less 1.
    group_size: input features, for files that do not say of each which group it is in (g_idx); -1 = all of them.
    """

    def shape(parts: Mapping[str, Any]) -> tuple[int, int]:
        num_words, out_features = parts["qweight"].get_shape()
        num_groups, num_zero_words = parts["qzeros"].get_shape()
        num_bits = find_num_bits(out_features, num_zero_words)
        in_features = num_words * WORD // num_bits
        if "g_idx" in parts:
            in_features = parts["g_idx"].get_shape()[0]
            if find_num_bits(in_features, num_words) != num_bits:
                raise ValueError("its codes and their zero points have different widths")
            _check_groups(parts["g_idx"], num_groups)
        else:
            find_block((out_features, in_features), (out_features, num_groups), [(1, group_size)])
        if list(parts["scales"].get_shape()) != [num_groups, out_features]:
            raise ValueError("its scales and zero points do not fit each other")
        return out_features, in_features

    def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scales, words = parts["scales"].T, parts["qzeros"]
        num_bits = find_num_bits(len(scales), words.shape[1])
        if is_v1:  # word by word, as those that write it subtract
            words = words + sum(1 << shift for shift in range(0, WORD, num_bits))
        zeros = unpack(words, num_bits)[:, : len(scales)].T
        codes = unpack(parts["qweight"].T, num_bits)
        if "g_idx" not in parts:
            return _scaled(codes, scales, zeros, (1, group_size))
        groups = parts["g_idx"].long()
        codes = codes[:, : len(groups)]
        return codes.float().sub_(zeros.float()[:, groups]).mul_(scales.float()[:, groups])

    return WeightFormat("qweight", ("qweight", "qzeros", "scales"), shape, dequantize, optional=("g_idx",))


def awq(*, group_size: int) -> WeightFormat:
    """Of 4 bits. Words run along the output features, in AWQ's order; all tensors are transposed."""

    def shape(parts: Mapping[str, Any]) -> tuple[int, int]:
        in_features, num_words = parts["qweight"].get_shape()
        num_groups, out_features = parts["scales"].get_shape()
        if num_words * 8 != out_features or list(parts["qzeros"].get_shape()) != [num_groups, num_words]:
            raise ValueError("its codes, scales and zero points do not fit each other as 4-bit ones of AWQ")
        find_block((out_features, in_features), (out_features, num_groups), [(1, group_size)])
        return out_features, in_features

    def columns(words: torch.Tensor) -> torch.Tensor:
        order = torch.tensor(AWQ_COLUMNS, device=words.device).argsort()
        return unpack(words, 4).unflatten(1, (-1, 8))[..., order].flatten(1)

    def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes, zeros = columns(parts["qweight"]).T, columns(parts["qzeros"]).T
        return _scaled(codes, parts["scales"].T, zeros, (1, group_size))

    return WeightFormat("qweight", ("qweight", "qzeros", "scales"), shape, dequantize)


def packed_integers(blocks: Sequence[Block]) -> WeightFormat:
    """Of compressed-tensors (pack-quantized): codes are signed, stored with their lowest value as 0."""

    def block_of(weight: Sequence[int], scales: Sequence[int], parts: Mapping[str, Any]) -> Block:
        return (1, 1) if "weight_g_idx" in parts else find_block(weight, scales, blocks)

    def shape(parts: Mapping[str, Any]) -> tuple[int, int]:
        out_features, in_features = parts["weight_shape"][...].tolist()
        if "weight_g_idx" in parts:
            _check_groups(parts["weight_g_idx"], parts["weight_scale"].get_shape()[1])
        find_num_bits(in_features, parts["weight_packed"].get_shape()[1])
        block_of((out_features, in_features), parts["weight_scale"].get_shape(), parts)
        return out_features, in_features

    def dequantize(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        out_features, in_features = parts["weight_shape"].tolist()
        scales, packed, zeros = parts["weight_scale"], parts["weight_packed"], parts.get("weight_zero_point")
        num_bits = find_num_bits(in_features, packed.shape[1])
        codes = unpack(packed, num_bits)[:, :in_features]
        if zeros is None:
            zeros = torch.full((1, 1), 1 << num_bits - 1, device=codes.device)
        elif zeros.dtype == torch.int32:
            zeros = unpack(zeros.T, num_bits)[:, :out_features].T
        else:
            zeros = zeros.float() + (1 << num_bits - 1)
        if "weight_g_idx" in parts:
            groups = parts["weight_g_idx"].long()
            scales, zeros = scales[:, groups], zeros[:, groups] if zeros.shape[1] > 1 else zeros
        return _scaled(codes, scales, zeros, block_of(codes.shape, scales.shape, parts))

    return WeightFormat(
        "weight_shape",
        ("weight_packed", "weight_scale", "weight_shape"),
        shape,
        dequantize,
        optional=("weight_zero_point", "weight_g_idx"),
    )


def _check_groups(groups: Any, num_groups: int) -> None:
    """Raise ValueError if an input feature is in no group: on a GPU, to look that up would end the process."""
    numbers = groups[...]
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_groups:
        raise ValueError(f"some of its input features are in no group, of {num_groups}")


def _scaled(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, block: Block) -> torch.Tensor:
    shape = codes.shape
    return codes.float().sub_(spread(zeros, shape, block)).mul_(spread(scales, shape, block))
