"""Weights in 8 bits for the linear layers of any model, made from those of its checkpoint as it is loaded.

Lossy: weights are rounded once, and each row of an input at each multiplication. Knows no model family.

Products of integers are exact, and each row of an input has a scale of its own: what comes out for a row depends neither on
how many rows there are, nor on the others.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any, Protocol

import torch

from engine.errors import ConfigError
from engine.executor.packed_linear import PackedWeight, is_right

logger = logging.getLogger(__name__)

# Largest value of an 8-bit weight. -128 is not used, so that a weight and its negative are rounded alike.
WEIGHT_LIMIT = 127
# Of a weight, to round: their quotients are in 32 bits.
NUM_ROWS_AT_ONCE = 4096
# Largest value of an input. Without VNNI instructions FBGEMM adds two products in 16 bits, which 8-bit inputs would exceed.
INPUT_LIMIT = 127 if torch.cpu._is_vnni_supported() else 63


class QuantizedWeight(PackedWeight, Protocol):
    """A packed weight that is not what the checkpoint says."""

    @classmethod
    def identity(cls) -> list[Any]:
        """What its products depend on besides the weight: KV of another one is another model's."""
        ...


class Int8Weight:
    """One scale for each output feature; multiplied as 8-bit integers, by FBGEMM."""

    PACKS_SINGLE_LAYERS = True
    CHECKED_LIMITS = (WEIGHT_LIMIT, INPUT_LIMIT)
    LOSS = 0.05

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        largest = torch.linalg.vector_norm(weight, torch.inf, dim=1, dtype=torch.float32)
        scales = (largest / WEIGHT_LIMIT).clamp_min(torch.finfo(torch.float32).tiny)
        parts = zip(weight.split(NUM_ROWS_AT_ONCE), scales.split(NUM_ROWS_AT_ONCE), strict=True)
        self._pack(torch.cat([(part / scale[:, None]).round().to(torch.int8) for part, scale in parts]), scales)
        self._bias = None if bias is None else bias.float()

    def _pack(self, integers: torch.Tensor, scales: torch.Tensor) -> None:
        zero_points = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # such tensors will go; none is kept here
            quantized = torch._make_per_channel_quantized_tensor(integers, scales.double(), zero_points, 0)
        self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.num_bytes = integers.nbytes + scales.nbytes

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        scales = x.abs().amax(dim=-1, keepdim=True).float() / INPUT_LIMIT
        scales.clamp_min_(torch.finfo(torch.float32).tiny)  # of a row of zeros
        out: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scales, 1.0, INPUT_LIMIT + 1, self._packed
        )
        out.mul_(scales)
        if self._bias is not None:
            out.add_(self._bias)
        return out.to(x.dtype)

    def unpack(self) -> torch.Tensor:
        integers, scales = self._integers()
        return integers * scales[:, None]

    @classmethod
    def identity(cls) -> list[Any]:
        return ["int8", WEIGHT_LIMIT, INPUT_LIMIT]

    def _integers(self) -> tuple[torch.Tensor, torch.Tensor]:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            quantized = torch.ops.quantized.linear_unpack(self._packed)[0]
        return quantized.int_repr(), quantized.q_per_channel_scales().float()

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        other = Int8Weight.__new__(Int8Weight)
        other._pack(*self._integers())
        other._bias = copy.deepcopy(self._bias, memo)
        return other


KINDS: dict[str, type[QuantizedWeight]] = {"int8": Int8Weight}


def choose_quantized(quantization: str, dtype: torch.dtype, device: torch.device) -> type[QuantizedWeight] | None:
    """What keeps weights as the option says; None if they stay in their dtype.

    Raises ConfigError if this machine cannot do what the option asks for.
    """
    if quantization == "none" or (quantization == "auto" and device.type != "cpu"):
        return None
    if device.type != "cpu":
        raise ConfigError(
            f"quantization {quantization} is made on CPUs only, and the model is on {device}; serve a checkpoint that is "
            "quantised already, or set quantization to none",
            param="quantization",
        )
    packing = KINDS["int8" if quantization == "auto" else quantization]
    try:
        reason = "" if is_right(packing, dtype) else f"{packing.__name__} gives wrong products"
    except (RuntimeError, AttributeError) as error:  # an operation that this torch lacks, or has not for this processor
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not reason:
        return packing
    if quantization == "auto":
        logger.warning(
            "weights stay in %s: torch %s cannot multiply 8-bit ones here (%s)", dtype, torch.__version__, reason
        )
        return None
    raise ConfigError(
        f"this torch ({torch.__version__}) cannot compute with quantization {quantization} on this processor ({reason}); set "
        "it to none",
        param="quantization",
    )
