"""What peft's adapter_config.json says of a LoRA adapter. Refuses what would be computed otherwise than it was trained.

Knows no tensors and no model but the names of its layers.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import AdapterError

logger = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
ALL_LINEAR = "all-linear"

# Fields that change what is computed if they are neither empty nor false, and why an adapter with them is refused.
_REFUSED = {
    "use_dora": "its weights are normalised (DoRA), which is not implemented; train without use_dora",
    "modules_to_save": "it brings whole modules of its own; train without modules_to_save",
    "trainable_token_indices": "it changes embeddings; train without trainable_token_indices",
    "target_parameters": "it changes parameters that are no linear layers; train with target_modules alone",
    "layer_replication": "it repeats layers of the model; use the model that this makes as a model of its own",
    "alora_invocation_tokens": "it begins in the middle of a context (activated LoRA), which is not implemented",
    "lora_bias": "it adds biases; train without lora_bias",
    "use_qalora": "it pools its input (QALoRA), which is not implemented; train without use_qalora",
    "arrow_config": "it is a router between adapters (Arrow), which is not implemented",
    "use_bdlora": "its weights are block-diagonal, which is not implemented; train without use_bdlora",
    "kasa_config": "it scales its ranks (KaSA), which is not implemented",
    "monteclora_config": "it draws its weights at random (MonteCLoRA), which is not implemented",
    "velora_config": "it compresses activations (VeLoRA), which is not implemented",
}
# Of init_lora_weights: peft changes the model's own weights at the start of these, and the adapter fits only that model.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields of no consequence once an adapter is trained.
_OF_TRAINING = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "tie_weights",
    ]
)
_USED = frozenset(
    [
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    ]
)


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA adapter as far as its configuration tells.

    targets: names of the model's linear layers that it changes.
    """

    targets: frozenset[str]
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def rank_of(self, layer: str) -> int:
        """Of the two matrices of a layer."""
        return self.rank_pattern.get(_pattern_for(layer, self.rank_pattern), self.r)

    def scale_of(self, layer: str) -> float:
        """What their product is multiplied by."""
        alpha = self.alpha_pattern.get(_pattern_for(layer, self.alpha_pattern), self.lora_alpha)
        rank = self.rank_of(layer)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_peft_config(folder: Path, linears: Collection[str]) -> tuple[PeftConfig, bytes]:
    """The configuration in a folder, and the file's content. Raises AdapterError, which names the field.

    linears: names of the model's linear layers that an adapter may change.
    """
    content = _read(folder / CONFIG_NAME)
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / CONFIG_NAME} is not JSON: {error}", param="adapters") from None
    if not isinstance(fields, dict):
        raise AdapterError(f"{folder / CONFIG_NAME} is no JSON object", param="adapters")

    def refuse(field: str, why: str) -> AdapterError:
        return AdapterError(
            f"the adapter in {folder} cannot be served: {field} in {CONFIG_NAME}: {why}", param="adapters"
        )

    if fields.get("peft_type") != "LORA":
        raise refuse("peft_type", f"only LORA is served, got {str(fields.get('peft_type'))[:40]!r}")
    for field, why in _REFUSED.items():
        if fields.get(field):
            raise refuse(field, why)
    if fields.get("bias", "none") != "none":
        raise refuse("bias", "it changes biases of the model; train with bias='none'")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_MODEL):
        raise refuse(
            "init_lora_weights",
            f"{start[:40]!r} changes the model's own weights; convert the adapter to plain LoRA with peft's save_pretrained("
            "path_initial_model_for_weight_conversion=...)",
        )
    if unknown := sorted(name for name, value in fields.items() if value and name not in _OF_TRAINING | _USED):
        logger.warning("%s: unknown fields count as of no consequence: %s", folder / CONFIG_NAME, ", ".join(unknown))
    ranks, alphas = (_numbers(fields.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
    r, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    if not _is_rank(r):
        raise refuse("r", f"must be a positive integer, got {str(r)[:40]}")
    if ranks is None or not all(map(_is_rank, ranks.values())):
        raise refuse("rank_pattern", "must be a mapping of names to positive integers")
    if alphas is None:
        raise refuse("alpha_pattern", "must be a mapping of names to numbers")
    if not _is_number(alpha):
        raise refuse("lora_alpha", f"must be a number, got {str(alpha)[:40]}")
    try:
        targets = _find_targets(fields, linears)
        config = PeftConfig(targets, r, alpha, ranks, alphas, bool(fields.get("use_rslora")))
        for layer in targets:
            config.scale_of(layer)  # its patterns are read here for the first time
    except (re.error, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise refuse("target_modules", f"names of layers, and patterns of them, cannot be read: {error}") from None
    if not targets:
        wanted = str(fields.get("target_modules"))[:120]
        raise refuse("target_modules", f"none of the model's linear layers is meant by {wanted}")
    return config, content


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterError(
            f"{path}: {error.strerror}; give the folder of an adapter, as peft saves it", param="adapters"
        ) from error
    if len(content) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} has more than {MAX_CONFIG_BYTES} bytes", param="adapters")
    return content


def _find_targets(fields: Mapping[str, Any], linears: Collection[str]) -> frozenset[str]:
    """As peft chooses them."""
    wanted = fields.get("target_modules")
    if wanted == ALL_LINEAR:
        found = set(linears)
    elif isinstance(wanted, str):
        found = {name for name in linears if re.fullmatch(wanted, name)}
    else:
        found = {name for name in linears if _ends_with(name, wanted or ())}
    excluded = fields.get("exclude_modules")
    if isinstance(excluded, str):
        found -= {name for name in found if re.fullmatch(excluded, name)}
    else:
        found -= {name for name in found if _ends_with(name, excluded or ())}
    numbers = fields.get("layers_to_transform")
    if numbers is not None and numbers != [] and not isinstance(wanted, str):
        kept = {numbers} if isinstance(numbers, int) else set(numbers)
        lists = fields.get("layers_pattern") or ()
        patterns = [rf"(?:^|.*?\.){each}\.(\d+)\." for each in ([lists] if isinstance(lists, str) else lists)]
        found = {name for name in found if _layer_number(name, patterns or [r".*?\.[^.]*\.(\d+)\."]) in kept}
    return frozenset(found)


def _ends_with(name: str, endings: Collection[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _layer_number(name: str, patterns: Collection[str]) -> int | None:
    """Of the list of layers that is meant; None if the layer is in none."""
    matches = (re.match(pattern, name) for pattern in patterns)
    return next((int(match[1]) for match in matches if match), None)


def _pattern_for(layer: str, patterns: Collection[str]) -> str:
    """The first of the patterns that means the layer; the layer itself if none does."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", layer)), layer)


def _numbers(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not all(map(_is_number, value.values())):
        return None
    return value


def _is_number(value: Any) -> bool:
    """That a float can hold: JSON has integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 1
