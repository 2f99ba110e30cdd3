"""Weights in 8 or 4 bits for the linear layers of any model, made from those of its checkpoint as it is loaded.

Lossy: weights are rounded once, and inputs at each multiplication. Knows no model family.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch

from engine.errors import ConfigError, KernelBuildError
from engine.executor.block_kernel import BLOCK_LEN, ROUNDING_VERSION, BlockWeight, is_fast
from engine.executor.packed_linear import PackedWeight, is_right

logger = logging.getLogger(__name__)


class QuantizedWeight(PackedWeight, Protocol):
    """A packed weight that is not what the checkpoint says."""

    @classmethod
    def identity(cls) -> list[Any]:
        """What its products depend on besides the weight: KV of another one is another model's."""
        ...


class Int8Weight(BlockWeight):
    """Weights from -127 to 127, with a scale for each 32 inputs of an output.

    Inputs are rounded to 8 bits, and to 15 in blocks with a value far beyond the others of its row.
    """

    PACKS_SINGLE_LAYERS = True
    CHECKED_LIMITS = (127, 127)
    LOSS = 0.02
    NUM_BITS, NUM_TERMS = 8, 2

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias, self.NUM_BITS, self.NUM_TERMS)

    @classmethod
    def identity(cls) -> list[Any]:
        return [f"int{cls.NUM_BITS}", BLOCK_LEN, cls.NUM_TERMS, ROUNDING_VERSION]


class Int4Weight(Int8Weight):
    """Weights from -8 to 7, with a scale for each 32 inputs of an output; inputs are rounded to 8 bits."""

    CHECKED_LIMITS = (7, 127)
    LOSS = 0.1
    NUM_BITS, NUM_TERMS = 4, 1


# In order of preference: a layer gets the first one with which it does not lose too much, and the last layer of a model, the
# head, whose errors are those of the answer, the last one.
KINDS: dict[str, tuple[type[QuantizedWeight], ...]] = {"int8": (Int8Weight,), "int4": (Int4Weight, Int8Weight)}


def choose_quantized(quantization: str, dtype: torch.dtype, device: torch.device) -> tuple[type[QuantizedWeight], ...]:
    """What keeps weights as the option says, in order of preference; nothing if they stay in their dtype.

    Raises ConfigError if this machine cannot do what the option asks for.
    """
    if quantization == "none" or (quantization == "auto" and device.type != "cpu"):
        return ()
    if device.type != "cpu":
        raise ConfigError(
            f"quantization {quantization} is made on CPUs only, and the model is on {device}; serve a checkpoint that is "
            "quantised already, or set quantization to none",
            param="quantization",
        )
    kinds = KINDS["int8" if quantization == "auto" else quantization]
    reason = ""
    try:
        if wrong := [kind.__name__ for kind in kinds if not is_right(kind, dtype)]:
            reason = f"{', '.join(wrong)} gives wrong products"
        elif quantization == "auto" and not is_fast():
            reason = "it would be slow"
    except KernelBuildError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not reason:
        return kinds
    if quantization == "auto":
        logger.warning("weights stay in %s: 8-bit ones cannot be multiplied well on this machine (%s)", dtype, reason)
        return ()
    raise ConfigError(
        f"this machine cannot compute with quantization {quantization} ({reason}); set it to none", param="quantization"
    )
