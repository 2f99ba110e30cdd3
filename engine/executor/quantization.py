"""Turns the linear layers of a loaded model into quantised ones, and says what that costs. Knows no model family."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.attention.transformers_door import ShapeProbe
from engine.executor.compiled_layers import logits_difference
from engine.executor.model_check import probe_logits
from engine.executor.packed_linear import PackedWeight, PlainWeight, leave_files, num_packed_bytes, pack_linears
from engine.executor.quantized_linear import QuantizedWeight
from engine.executor.sharding import num_local_bytes

logger = logging.getLogger(__name__)

MIB = 1 << 20


def quantize(
    name: str, model: Any, text_config: Any, quantized: type[QuantizedWeight], otherwise: type[PackedWeight] | None
) -> bool:
    """Quantise a model in place; the log says how large it is then, and how far off its logits are.

    name: of the model, for the log.
    otherwise: what packs the layers that would lose too much; the rest keeps plain weights. None = nothing.

    Returns False, with a model that is of no use any more, if its code cannot use such layers.
    """
    num_bytes = num_local_bytes(model)
    expected = probe_logits(model, text_config, ShapeProbe())
    _make_linear(model)
    packings = [packing for packing in (quantized, otherwise, PlainWeight) if packing is not None]
    try:
        num_layers = pack_linears(model, lambda: probe_logits(model, text_config, ShapeProbe()), *packings)
        error = logits_difference(probe_logits(model, text_config, ShapeProbe()), expected)
    except (RuntimeError, AttributeError, TypeError, ValueError) as failure:
        logger.warning("%s: its code cannot use quantised layers: %r", name, failure)
        return False
    if not num_layers or error != error:
        logger.warning("%s: no layer could be quantised, or its logits are not finite then", name)
        return False
    leave_files(model)
    logger.info(
        "%s: %d linear layers quantised (%s), %.0f MiB of weights instead of %.0f; logits differ by %.1e of the largest",
        name,
        num_layers,
        quantized.__name__,
        (num_local_bytes(model) + num_packed_bytes(model)) / MIB,
        num_bytes / MIB,
        error,
    )
    return True


def _make_linear(model: nn.Module) -> None:
    """Put linear layers in place of GPT-2's Conv1D, which are linear layers with a transposed weight."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                layer = nn.Linear(*child.weight.shape, device="meta")
                layer.weight = nn.Parameter(child.weight.detach().T, requires_grad=False)
                layer.bias = nn.Parameter(child.bias.detach(), requires_grad=False)
                setattr(parent, name, layer)
