"""Turns the linear layers of a loaded model into quantised ones, and says what that costs. Knows no model family."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.attention.transformers_door import ShapeProbe
from engine.executor.compiled_layers import logits_difference
from engine.executor.model_check import probe_logits
from engine.executor.packed_linear import (
    PackedLinear,
    PackedWeight,
    PlainWeight,
    leave_files,
    num_packed_bytes,
    pack_linears,
)
from engine.executor.quantized_linear import QuantizedWeight
from engine.executor.sharding import num_local_bytes

logger = logging.getLogger(__name__)

MIB = 1 << 20


def quantize(
    name: str,
    model: Any,
    text_config: Any,
    kinds: Sequence[type[QuantizedWeight]],
    otherwise: type[PackedWeight] | None,
) -> bool:
    """Quantise a model in place; the log says how large it is then, and how far off its logits are.

    name: of the model, for the log.
    kinds: in order of preference, for layers that lose too much by the first; the head, whose errors are those of the
        answer, gets the last.
    otherwise: what packs the layers that would lose too much by all; the rest keeps plain weights. None = nothing.

    Returns False, with a model that is of no use any more, if its code cannot use such layers.
    """
    num_bytes = num_local_bytes(model)
    expected = probe_logits(model, text_config, ShapeProbe())
    _make_linear(model)
    unquantized = [packing for packing in (otherwise, PlainWeight) if packing is not None]
    own = {model.get_output_embeddings(): (kinds[-1], *unquantized)}
    try:
        pack_linears(model, lambda: probe_logits(model, text_config, ShapeProbe()), *kinds, *unquantized, own=own)
        error = logits_difference(probe_logits(model, text_config, ShapeProbe()), expected)
    except (RuntimeError, AttributeError, TypeError, ValueError) as failure:
        logger.warning("%s: its code cannot use quantised layers: %r", name, failure)
        return False
    counts = Counter(kinds_of_layers(model))
    if not any(counts[kind.__name__] for kind in kinds) or error != error:
        logger.warning("%s: no layer could be quantised, or its logits are not finite then", name)
        return False
    leave_files(model)
    logger.info(
        "%s: linear layers quantised (%s), %.0f MiB of weights instead of %.0f; logits differ by %.1e of the largest",
        name,
        ", ".join(f"{count} {kind}" for kind, count in counts.items()),
        (num_local_bytes(model) + num_packed_bytes(model)) / MIB,
        num_bytes / MIB,
        error,
    )
    return True


def kinds_of_layers(model: nn.Module) -> list[str]:
    """How each linear layer of a model keeps its weight, in the order of its modules."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return [module.packing.__name__ for module in packed for _ in module.sizes]


def _make_linear(model: nn.Module) -> None:
    """Put linear layers in place of GPT-2's Conv1D, which are linear layers with a transposed weight."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                layer = nn.Linear(*child.weight.shape, device="meta")
                layer.weight = nn.Parameter(child.weight.detach().T, requires_grad=False)
                layer.bias = nn.Parameter(child.bias.detach(), requires_grad=False)
                setattr(parent, name, layer)
