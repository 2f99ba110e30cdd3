"""What a model needs: memory of its weights and of a token's KV, and what that leaves room for. Loads no weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError

GIB, KIB = 1 << 30, 1 << 10
# GiB that a device shows, by the name that people call it.
DEVICES = {
    "h200": 139.8,
    "h100": 79.1,
    "a100": 79.1,
    "a100-40": 39.4,
    "l40s": 44.4,
    "a10": 22.0,
    "l4": 22.0,
    "t4": 14.6,
    "b200": 178.4,
    "mi300x": 191.7,
    "v100": 31.7,
}
# What the largest step and the graphs take of a device, in GiB; measured at the start of an engine, and this before.
ACTIVATIONS_GIB = 3.0
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Bytes, of the whole model and of one of its ranks.

    kv_bytes: of one token.
    window: tokens, prompt and answer; None if the model does not say.
    cold_share: of these bytes, what a token takes in the tiers behind the GPU tier.
    """

    num_ranks: int
    weight_bytes: int
    rank_weight_bytes: int
    kv_bytes: int
    rank_kv_bytes: int
    window: int | None
    cold_share: float = 1.0


def measure_config(
    hf_config: Any, num_ranks: int = 1, dtype: str = "bfloat16", kv_cold_dtype: str = "same"
) -> ModelSize:
    """The size of a model with this transformers configuration, in so many ranks.

    kv_cold_dtype: the option, with chunks of its default size.

    Raises UnsupportedModelError if it cannot be shared by so many.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from engine.executor.sharding import make_plan

    text_config = hf_config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    plan = make_plan(text_config.model_type, hf_config, num_ranks) if num_ranks > 1 else {}
    sharded = {style for style in plan.values() if "rowwise" in style or "colwise" in style}
    item = ITEM_BYTES[dtype]
    weight_bytes = rank_weight_bytes = 0
    for name, parameter in model.named_parameters():  # tied ones once
        generic = re.sub(r"\.\d+(?=\.)", ".*", name)
        style = plan.get(generic) or plan.get(generic.rpartition(".")[0])
        num_bytes = item * parameter.numel()
        weight_bytes += num_bytes
        rank_weight_bytes += num_bytes // (num_ranks if style in sharded else 1)
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    num_kv_heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    head_bytes = 2 * text_config.num_hidden_layers * head_dim * item
    num_rank_heads = max(1, num_kv_heads // num_ranks)  # more ranks than heads have copies of them
    window = getattr(text_config, "max_position_embeddings", None)
    return ModelSize(
        num_ranks,
        weight_bytes,
        rank_weight_bytes,
        head_bytes * num_rank_heads * num_ranks if num_kv_heads < num_ranks else head_bytes * num_kv_heads,
        head_bytes * num_rank_heads,
        window,
        _cold_share(kv_cold_dtype, dtype, text_config.num_hidden_layers, num_rank_heads, head_dim),
    )


def _cold_share(kind: str, dtype: str, num_layers: int, num_heads: int, head_dim: int) -> float:
    """Bytes of a record over those of a block, on one rank."""
    if kind == "same":
        return 1.0
    import torch

    from engine.attention.protocol import LayerShape
    from engine.executor.tiers.cold_format import ColdFormat

    layers = [LayerShape(num_heads, head_dim, head_dim)] * num_layers
    cold = ColdFormat(kind, layers, EngineConfig().chunk_size, getattr(torch, dtype))
    return cold.block_bytes / (cold.num_elements * ITEM_BYTES[dtype])


def measure_model(
    model: str, num_ranks: int = 1, dtype: str = "auto", kv_cold_dtype: str = "same"
) -> tuple[ModelSize, str]:
    """The size of a model by the option `model`, and its dtype. Reads its configuration only.

    Raises ModelLoadError or ConfigError.
    """
    from transformers import AutoConfig

    from engine.errors import ModelLoadError
    from engine.executor.checkpoint.kinds import take_kind
    from engine.model_files import model_location

    try:
        hf_config = AutoConfig.from_pretrained(model_location(model))
    except (OSError, ValueError, TypeError, AttributeError) as error:  # of a damaged config.json
        raise ModelLoadError(f"the configuration of {model!r} cannot be read: {error}") from error
    take_kind(model, hf_config)  # a quantised checkpoint is as large as its model
    if dtype not in ("auto", *ITEM_BYTES):
        raise ConfigError(f"unknown dtype {dtype!r}; it is auto or one of {', '.join(ITEM_BYTES)}", param="dtype")
    if dtype == "auto":
        dtype = str(getattr(hf_config, "dtype", None) or "bfloat16").removeprefix("torch.")
        dtype = dtype if dtype in ITEM_BYTES else "bfloat16"
    return measure_config(hf_config, num_ranks, dtype, kv_cold_dtype), dtype


def device_gib(device: str) -> float:
    """Memory of a device by its name, or a number of GiB. Raises ConfigError."""
    known = DEVICES.get(device.lower())
    if known is not None:
        return known
    try:
        number = float(device)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(
            f"unknown device {device!r}; give its memory in GiB, or one of {', '.join(DEVICES)}", param="gpu"
        )
    return number


@dataclass(frozen=True, slots=True)
class Sizing:
    """How the tiers of one replica come out.

    gpu_tokens: that the GPU tier holds; below 0 = the weights alone do not fit.
    cpu_gib: for the conversations of all users that the GPU tier has no room for.
    disk_gib: for all of them once more, so that they outlive a restart.
    """

    usable_gib: float
    gpu_gib: float
    gpu_tokens: int
    cpu_gib: float
    disk_gib: float


def size_tiers(size: ModelSize, gib: float, utilization: float, num_users: int, num_tokens: int) -> Sizing:
    """For `num_users` conversations of `num_tokens` each, on devices of so many GiB."""
    usable_gib = gib * utilization
    gpu_gib = usable_gib - size.rank_weight_bytes / GIB - ACTIVATIONS_GIB
    gpu_tokens = int(gpu_gib * GIB / size.rank_kv_bytes)
    num_wanted = num_users * num_tokens
    left = max(0, num_wanted - max(0, gpu_tokens))
    cold_gib = size.kv_bytes * size.cold_share / GIB
    return Sizing(usable_gib, gpu_gib, gpu_tokens, left * cold_gib, num_wanted * cold_gib)
