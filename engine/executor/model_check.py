"""Checks that a model can be served from a paged KV cache, and that it computes the same with our attention."""

from __future__ import annotations

from typing import Any

import torch

from engine.attention.comparison import Comparison, NoOwnAttentionError, compared_by
from engine.attention.transformers_door import ATTENTION_NAME, ShapeProbe, attention_handled_by
from engine.config import EngineConfig
from engine.errors import UnsupportedModelError
from engine.executor.compiled_layers import logits_difference

PROBE_LEN = 24
# Difference of logits (`logits_difference`) that counts as rounding in any model. Deep ones make more of it: they may differ
# by so many times what they differ by if attention alone is rounded otherwise.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
NUM_ROUNDINGS = 8
# Patterns of attention that a mask-free paged cache would get silently wrong.
REFUSED_LAYER_TYPES = ("chunked_attention", "linear_attention", "mamba", "recurrent", "conv")


def reject_unsupported(model: str, text_config: Any, max_model_len: int | None) -> None:
    if getattr(text_config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{model!r} is an encoder-decoder model; only decoder models can be served")
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    refused = sorted(t for t in layer_types if any(t.startswith(name) for name in REFUSED_LAYER_TYPES))
    if refused:
        raise UnsupportedModelError(
            f"{model!r} ({text_config.model_type}) has layers of type {', '.join(refused)}, which cannot be served from "
            "a paged KV cache; use a model with full or sliding-window attention"
        )

    rope = getattr(text_config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        limit = parameters.get("original_max_position_embeddings")
        window = max_model_len or model_window(text_config)
        if parameters.get("rope_type") == "longrope" and limit and window > limit:
            # Past that length it turns every token of the batch otherwise, also other requests', and not those cached.
            raise UnsupportedModelError(
                f"{model!r} ({text_config.model_type}) has a rotary embedding (longrope) that changes for a whole batch once "
                f"one token is past position {limit}; it can be served with max_model_len {limit} at most",
                param="max_model_len",
            )


@torch.inference_mode()
def probe_logits(model: Any, text_config: Any, handler: ShapeProbe, num_tokens: int = PROBE_LEN) -> torch.Tensor:
    """Logits [1, num_tokens, vocabulary] of a forward whose attention goes to `handler`.

    The model has to use our attention already. The ids are spread over the vocabulary except its ends, where
    special tokens are, and ids that no tokenizer knows.
    """
    vocab_size = text_config.vocab_size
    stride = max(1, vocab_size * 8 // 10 // num_tokens)
    input_ids = (vocab_size // 10 + stride * torch.arange(num_tokens, device=model.device)[None]) % vocab_size
    positions = torch.arange(num_tokens, device=model.device)[None]
    with attention_handled_by(handler):
        logits: torch.Tensor = model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
    return logits


def rounding_tolerance(rounded: torch.Tensor, otherwise: torch.Tensor, dtype: torch.dtype) -> float:
    """Of logits, from those of two forwards that differ in how attention is rounded."""
    return max(PROBE_TOLERANCE[dtype], NUM_ROUNDINGS * logits_difference(otherwise, rounded))


@torch.inference_mode()
def check_attention(config: EngineConfig, model: Any, text_config: Any, dtype: torch.dtype) -> tuple[ShapeProbe, float]:
    """Reject the model if transformers' own attention and ours differ, call by call or in the logits.

    Both compute in a wider dtype than the model's, because its own code rounds the scores to that, and may be far from
    what it means. A family that does not use the attention registry would accept ours and be silently wrong.

    Leaves ours in charge. Returns what saw the calls, and the tolerance of later comparisons of logits.
    """
    name, family = config.model, text_config.model_type
    window = model_window(text_config)
    comparison = Comparison(min(window, config.max_model_len or window))
    try:
        with compared_by(comparison):
            expected = probe_logits(model, text_config, ShapeProbe())
    except NoOwnAttentionError:
        expected = probe_logits(model, text_config, ShapeProbe())
    model.set_attn_implementation(ATTENTION_NAME)
    probe, wide_probe = ShapeProbe(), ShapeProbe(is_wide=True)
    rounded, actual = (probe_logits(model, text_config, handler) for handler in (probe, wide_probe))
    num_layers = text_config.num_hidden_layers
    if len(probe.calls) != num_layers:
        raise UnsupportedModelError(
            f"{name!r} ({family}) has {num_layers} layers but made {len(probe.calls)} calls to the attention interface of "
            "transformers: its family does not support replaceable attention, so its KV cannot be paged"
        )
    if comparison.fault is not None:
        raise UnsupportedModelError(
            f"{name!r} ({family}) cannot be served from a paged KV cache: {comparison.fault}, but its own code and the "
            "engine's must agree"
        )
    num_windows = sum(call.params.sliding_window is not None for call in probe.calls)
    has_unknown_masks = comparison.num_unknown_masks > 0 or comparison.num_calls < num_layers
    if has_unknown_masks and num_windows < _num_sliding_layers(text_config):
        # The probe is too short to show it: such a family puts the window into the mask alone.
        raise UnsupportedModelError(
            f"{name!r} ({family}) has layers with a sliding window but does not pass it to the attention "
            "interface, so its KV cannot be paged"
        )
    if not expected.isfinite().all(dim=-1).any():
        raise UnsupportedModelError(
            f"{name!r} ({family}) yields no finite logits in {dtype}, also with transformers' own attention; use dtype "
            "'bfloat16' or 'float32'",
            param="dtype",
        )
    tolerance = rounding_tolerance(rounded, actual, dtype)
    error = logits_difference(actual, expected)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{name!r} ({family}) gives other logits with paged attention than with transformers' own (relative difference "
            f"{error:.1e}, of which {tolerance:.1e} may be rounding): its attention uses a feature that the paged cache "
            "does not support"
        )
    return probe, tolerance


def model_window(text_config: Any) -> int:
    """Tokens that the model was made for; very many where its config does not say."""
    return int(getattr(text_config, "max_position_embeddings", None) or 2**20)


def _num_sliding_layers(text_config: Any) -> int:
    """Layers that see less than the whole window of the model."""
    window = getattr(text_config, "sliding_window", None)
    if window is None or window >= model_window(text_config):
        return 0
    layer_types = getattr(text_config, "layer_types", None)
    return text_config.num_hidden_layers if layer_types is None else list(layer_types).count("sliding_attention")
