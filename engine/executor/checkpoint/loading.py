"""Makes a model of a quantised checkpoint, with weights in the model's dtype."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from engine.errors import ConfigError, ModelLoadError
from engine.executor.checkpoint.kinds import CheckpointKind
from engine.executor.checkpoint.stored_weights import StoredWeight, open_weights

logger = logging.getLogger(__name__)

MIB = 1 << 20
# Endings of the names of tensors without which what lies beside them is no weight.
PARTS_OF_WEIGHTS = re.compile(
    r"[._](qweight|qzeros|scales|g_idx|weight_packed|weight_scale\w*|weight_zero_point|scale_inv|qscale\w*|absmax|SCB|blocks)$"
    r"|\._weight_\w+$"
)


def read_quantized(
    name: str, location: str, hf_config: Any, kind: CheckpointKind, device: torch.device, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A model, and transformers' report on its keys.

    name: of the model, for the log and for errors.
    device: where the weights are made.
    options: of transformers' `from_pretrained`, the dtype among them.

    Raises ModelLoadError or ConfigError, and what transformers raises.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(hf_config)
    if any(isinstance(module, Conv1D) for module in empty.modules()):
        raise ConfigError(
            f"{name!r} ({hf_config.model_type}) is quantised ({kind.method}), and its family keeps weights transposed, which "
            "no quantised checkpoint is read with; take the checkpoint that it was made from",
            param="model",
        )
    with open_weights(location, kind.formats, device, options["dtype"]) as weights:
        stored = [weight for weight in weights.values() if isinstance(weight, StoredWeight)]
        logger.info(
            "%s: %d of its weights are quantised (%s), %.0f MiB of files; they are dequantised as they are read, to %.0f MiB "
            "of %s. `quantization` makes them small again",
            name,
            len(stored),
            kind.method,
            sum(weight.num_bytes for weight in stored) / MIB,
            sum(math.prod(weight.shape) for weight in stored) * options["dtype"].itemsize / MIB,
            str(options["dtype"]).removeprefix("torch."),
        )
        # Its own class, because the automatic one takes no weights without a folder.
        model, report = type(empty).from_pretrained(None, config=empty.config, state_dict=weights, **options)
    return model, report


def check_nothing_left(name: str, unexpected: Iterable[str]) -> None:
    """Raise ModelLoadError if keys of a checkpoint that the model has no place for belong to quantised weights."""
    left = sorted(key for key in unexpected if PARTS_OF_WEIGHTS.search(key))
    if left:
        raise ModelLoadError(
            f"the files of {name!r} have {len(left)} parts of quantised weights that its configuration says nothing of, such "
            f"as {left[0]}; take the checkpoint that it was made from, or one with a quantization_config",
            param="model",
        )
