"""Brings a model from a local folder or the hub into memory, and checks that it computes right.

The model is transformers' own code with our attention in it; both have to agree. Rejects what cannot work.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.distributed import DistributedConfig

from engine.attention.device_health import check_device
from engine.attention.protocol import AttentionCall, LayerShape
from engine.attention.transformers_door import ATTENTION_NAME, ShapeProbe
from engine.config import EngineConfig
from engine.core.executor_protocol import ModelFacts
from engine.errors import ConfigError, ModelLoadError, UnsupportedModelError
from engine.executor.checkpoint.kinds import CheckpointKind, take_kind
from engine.executor.checkpoint.loading import check_nothing_left, read_quantized
from engine.executor.compiled_layers import compile_layers, find_layers, logits_difference, recorded_seconds
from engine.executor.fingerprint import fingerprint_of, fingerprint_random, fingerprint_weights
from engine.executor.fused_layers import NUM_SEEN_ROWS, fuse_layers, separate
from engine.executor.lora.adapters import Adapters
from engine.executor.lora.layers import install_layers
from engine.executor.model_check import (
    PROBE_TOLERANCE,
    check_attention,
    model_window,
    probe_logits,
    reject_unsupported,
    rounding_tolerance,
)
from engine.executor.packed_linear import PackedWeight, choose_packing, leave_files, num_packed_bytes, pack_linears
from engine.executor.process_group import ProcessGroup
from engine.executor.quantization import kinds_of_layers, quantize
from engine.executor.quantized_linear import choose_quantized
from engine.executor.rms_norm import put_back, replace_norms
from engine.executor.sharding import is_own, local_part, localize, make_plan, num_local_bytes
from engine.host_memory import check_weights
from engine.model_files import is_hub_id, model_location

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, or one rank's shard of it.

    layers: the KV shapes of this rank's layers.
    attention_calls: the calls of attention in one forward, in order; of this rank.
    num_attention_heads: query heads of a layer, of the whole model.
    num_parameters: of the whole model.
    num_weight_bytes: of this rank.
    max_model_len: the window by the model's config, in tokens.
    adapters: what is added to its layers for some requests; None = the options ask for none.
    fingerprint: identity of what makes its KV, see fingerprint_weights. The same on all ranks of a group; a group of another
        size has another one.
    """

    model: Any
    device: torch.device
    dtype: torch.dtype
    layers: tuple[LayerShape, ...]
    attention_calls: tuple[AttentionCall, ...]
    num_attention_heads: int
    num_parameters: int
    num_weight_bytes: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    has_compiled_layers: bool = False
    adapters: Adapters | None = None

    @property
    def facts(self) -> ModelFacts:
        """What is the same on all ranks, as plain data."""
        return ModelFacts(
            fingerprint=self.fingerprint,
            dtype=str(self.dtype).removeprefix("torch."),
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
            num_parameters=self.num_parameters,
            num_layers=len(self.layers),
            num_attention_heads=self.num_attention_heads,
            head_dim=self.layers[0].k_dim,
        )


def choose_device(option: str) -> torch.device:
    """The device of the option `device`; raises ConfigError if there is none such."""
    if option == "auto":
        option = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(option)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {option!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use 'auto' or 'cpu', or "
            "install a CUDA build of torch",
            param="device",
        )
    return device


def load_model(config: EngineConfig, group: ProcessGroup | None = None) -> LoadedModel:
    """Load a model, check it, and put its layers in place.

    Weights go straight to the device, one file at a time, into a model that was built empty: peak memory stays near the
    size of the weights.

    group: whose shard of it this rank loads; None = all of it.

    Raises ModelLoadError or UnsupportedModelError.
    """
    location = model_location(config.model)
    device = choose_device(config.device) if group is None else group.device
    if not sys.stderr.isatty():  # a progress bar in a log file is noise
        transformers.utils.logging.disable_progress_bar()
    hf_config, kind = _read_config(config)
    text_config = hf_config.get_text_config()
    dtype = _choose_dtype(config.dtype, text_config, device)
    quantized = choose_quantized(config.quantization, dtype, device)
    plan = {} if group is None else make_plan(config.model, hf_config, group.size)
    if device.type == "cpu" and (num_bytes := _num_weight_bytes(hf_config, dtype)) is not None:
        check_weights(config.model, num_bytes)
    if config.load_format == "dummy":
        logger.warning("%s: random weights instead of its own, for measurements (load_format)", config.model)
        model = _make_random_model(hf_config, dtype, device)
    else:
        model = _read_model(config, hf_config, kind, dtype, device, group, plan)
    model.eval()
    # Some families look at every forward whether tokens are padding, and wait for the device to say so. Ours never are.
    model.config.get_text_config().pad_token_id = None
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    fingerprint = _fingerprint(config, hf_config, model, dtype, device, group)
    if group is not None:
        _localize(config.model, model, text_config, dtype, plan, group)
    num_weight_bytes = num_local_bytes(model)
    probe, tolerance = check_attention(config, model, text_config, dtype)
    wants_compiled = _wants_compiled_layers(config, device)
    decoder_layers = find_layers(model, text_config.num_hidden_layers)  # not later: packed, they have no parameters
    packing = None
    if config.pack_weights and not (wants_compiled and device.type == "cpu"):  # a compiler does not know its operations
        packing = choose_packing(dtype, device)
    if quantized:
        is_quantized = quantize(config.model, model, text_config, quantized, packing)
        if not (is_quantized if group is None else group.minimum(is_quantized)):
            if config.quantization != "auto":
                raise UnsupportedModelError(
                    f"{config.model!r} ({text_config.model_type}) cannot be served with quantization {config.quantization}: "
                    "see the log; set it to none",
                    param="quantization",
                )
            del model, probe, decoder_layers
            _free_memory(device)
            return load_model(replace(config, quantization="none"), group)
        own = fingerprint_of([kind.identity() for kind in quantized], kinds_of_layers(model))
        fingerprint = fingerprint_of(fingerprint, own if group is None else group.gather(own))
        num_weight_bytes = num_local_bytes(model) + num_packed_bytes(model)
        # Inputs are rounded, too: one may be rounded the other way if a sum in front of it is made in another order, and that
        # costs more than the rounding of float32. No more is allowed than what the kind that loses least may lose.
        tolerance = max(tolerance, min(kind.LOSS for kind in quantized))
    elif packing is not None:
        is_packed = _pack(config.model, model, text_config, tolerance, packing)
        if not (is_packed if group is None else group.minimum(is_packed)):
            del model, probe, decoder_layers
            _free_memory(device)
            return load_model(replace(config, pack_weights=False), group)
    if packing is not None and device.type == "cpu":
        _replace_norms(config.model, model, text_config, dtype, tolerance)
    adapters = None
    if config.serves_adapters:
        layers = install_layers(model, hf_config, plan, group, lambda: probe_logits(model, text_config, ShapeProbe()))
        adapters = Adapters(layers, device, dtype, config.max_lora_rank)
    if packing is not None and device.type == "cpu" and group is None:
        _fuse_layers(config, model, text_config, decoder_layers, tolerance)
    is_compiled = wants_compiled and _compile(config, model, text_config, decoder_layers, tolerance, device)
    return LoadedModel(
        model=model,
        device=device,
        dtype=dtype,
        layers=tuple(call.shape for call in probe.calls),
        attention_calls=tuple(probe.calls),
        num_attention_heads=probe.calls[0].num_heads if group is None else text_config.num_attention_heads,
        num_parameters=num_parameters,
        num_weight_bytes=num_weight_bytes,
        vocab_size=text_config.vocab_size,
        max_model_len=model_window(text_config),
        eos_token_ids=_eos_token_ids(location, text_config),
        fingerprint=fingerprint,
        has_compiled_layers=is_compiled,
        adapters=adapters,
    )


def _free_memory(device: torch.device) -> None:
    """Of a model that nothing holds any more: two of them may not fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_can_be_sharded(config: EngineConfig) -> None:
    """Read a model's configuration and raise what shows without its weights.

    Raises ModelLoadError or UnsupportedModelError.
    """
    hf_config, _ = _read_config(config)
    try:
        make_plan(config.model, hf_config, config.tensor_parallel_size)
    except ValueError as error:  # no decoder
        raise _load_error(config.model, error) from error


def _read_config(config: EngineConfig) -> tuple[Any, CheckpointKind | None]:
    """transformers' config of a model that can be served, and how its checkpoint is quantised; None = not at all."""
    try:
        hf_config = AutoConfig.from_pretrained(model_location(config.model))
    except (OSError, ValueError, TypeError, AttributeError) as error:  # of a damaged config.json
        raise _load_error(config.model, error) from error
    reject_unsupported(config.model, hf_config.get_text_config(), config.max_model_len)
    return hf_config, take_kind(config.model, hf_config)


def _read_model(
    config: EngineConfig,
    hf_config: Any,
    kind: CheckpointKind | None,
    dtype: torch.dtype,
    device: torch.device,
    group: ProcessGroup | None,
    plan: dict[str, str],
) -> Any:
    """plan: how its weights are cut for the ranks of `group`."""
    name, location, family = config.model, model_location(config.model), hf_config.get_text_config().model_type
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}
    try:
        with nullcontext() if group is None else group.environment():
            if group is None:
                options["device_map"] = {"": device}
            else:
                options["distributed_config"] = DistributedConfig(tp_size=group.size, tp_plan=plan)
            if kind is None:
                model, report = AutoModelForCausalLM.from_pretrained(location, **options)
            else:
                model, report = read_quantized(name, location, hf_config, kind, device, options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _load_error(name, error) from error
    if report["missing_keys"]:  # transformers would go on with random ones
        raise ModelLoadError(
            f"the files of {name!r} lack {len(report['missing_keys'])} weights of a {family} model, such as "
            f"{min(report['missing_keys'])}; is the download complete, and of a decoder model?",
            param="model",
        )
    check_nothing_left(name, report["unexpected_keys"])
    return model


def _num_weight_bytes(hf_config: Any, dtype: torch.dtype) -> int | None:
    """What the weights will take in memory, told without reading them; None if that is not known."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    except Exception as error:  # whatever a model's own code raises: loading it tells better
        logger.debug("the size of the weights is not known before they are there: %r", error)
        return None
    return int(sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))


def _make_random_model(hf_config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of random weights, the same ones each time, made on its device to save the way there."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="eager")


def _fingerprint(
    config: EngineConfig,
    hf_config: Any,
    model: Any,
    dtype: torch.dtype,
    device: torch.device,
    group: ProcessGroup | None,
) -> str:
    if config.load_format == "dummy":
        return fingerprint_random(hf_config, dtype, device)
    own = fingerprint_weights(hf_config, {name: local_part(part) for name, part in model.state_dict().items()})
    return own if group is None else fingerprint_of(group.gather(own))


def _load_error(model: str, error: Exception) -> ModelLoadError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    if os.strerror(errno.ENOMEM) in reason:
        return ModelLoadError(
            f"memory has run out while {model!r} was loaded ({reason}); let this process have more (`ulimit -v`, the control "
            "group), or take a smaller model",
            param="model",
        )
    if not is_hub_id(model):
        return ModelLoadError(
            f"cannot load a model from {model!r}: {reason}; give the folder of a complete checkpoint of a decoder model, as "
            "transformers saves it",
            param="model",
        )
    return ModelLoadError(
        f"{model!r} is neither a local folder nor a model that the Hugging Face hub gave ({reason}). Without access to "
        "the hub, download the model elsewhere and give its folder as the option 'model' (and set HF_HUB_OFFLINE=1 to be "
        "told at once)",
        param="model",
    )


def _choose_dtype(option: str, text_config: Any, device: torch.device) -> torch.dtype:
    if option != "auto":
        dtype: torch.dtype = getattr(torch, option)
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if _has_bfloat16() else torch.float32
    return text_config.dtype if text_config.dtype in PROBE_TOLERANCE else torch.bfloat16


def _has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself; others do that slower than float32."""
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def _pack(name: str, model: Any, text_config: Any, tolerance: float, packing: type[PackedWeight]) -> bool:
    """Pack the model's linear layers. False if it does not compute the same any more, and is useless then."""
    expected = probe_logits(model, text_config, ShapeProbe())
    try:
        num_packed = pack_linears(model, lambda: probe_logits(model, text_config, ShapeProbe()), packing)
        error = logits_difference(probe_logits(model, text_config, ShapeProbe()), expected)
    except (RuntimeError, AttributeError, TypeError, ValueError) as failure:
        check_device(model.device)
        logger.warning("%s: not served with packed weights, its code cannot use them: %s", name, repr(failure))
        return False
    if not error <= tolerance:
        logger.warning("%s: not served with packed weights, its logits differ then by %.1e", name, error)
        return False
    logger.info("%s: %d linear layers packed (%s)", name, num_packed, packing.__name__)
    if model.device.type == "cpu":
        leave_files(model)
    return True


def _replace_norms(name: str, model: Any, text_config: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Normalisations by one call each, unless the model then computes something else."""
    expected = probe_logits(model, text_config, ShapeProbe())
    replaced = replace_norms(model, dtype)
    try:
        error = logits_difference(probe_logits(model, text_config, ShapeProbe()), expected)
    except Exception as failure:  # whatever the model's code wants of a module that is gone
        put_back(replaced)
        logger.warning("%s: its normalisations stay as they are, its code needs them: %r", name, failure)
        return
    if not error <= tolerance:
        put_back(replaced)
        logger.warning("%s: its normalisations stay as they are, its logits differ then by %.1e", name, error)
        return
    logger.info("%s: %d normalisations by one call each", name, len(replaced))


def _fuse_layers(
    config: EngineConfig,
    model: Any,
    text_config: Any,
    layers: Sequence[nn.Module],
    tolerance: float,
) -> None:
    """Compute layers by two calls each, unless the model then computes something else."""
    num_rows = min(NUM_SEEN_ROWS, model_window(text_config))

    def logits() -> torch.Tensor:
        return probe_logits(model, text_config, ShapeProbe(), num_rows)

    try:
        expected = logits()
        num_fused = fuse_layers(layers, logits)
        error = logits_difference(logits(), expected)
    except Exception as failure:  # whatever the model's code wants of a layer, or of so many rows
        separate(layers)
        logger.warning("%s: its decoder layers stay as they are, its code needs them: %r", config.model, failure)
        return
    if not error <= tolerance:
        separate(layers)
        logger.warning("%s: its decoder layers stay as they are, its logits differ then by %.1e", config.model, error)
        return
    logger.info("%s: %d of %d decoder layers by two calls each", config.model, num_fused, len(layers))


def _wants_compiled_layers(config: EngineConfig, device: torch.device) -> bool:
    if config.compile_layers is None:
        return device.type == "cuda" and not config.enforce_eager and config.tensor_parallel_size == 1
    return config.compile_layers


def _compile(
    config: EngineConfig,
    model: Any,
    text_config: Any,
    layers: Sequence[nn.Module],
    tolerance: float,
    device: torch.device,
) -> bool:
    """Compile the model's layers if that works and, unless it is asked for, pays; returns whether it did."""
    logger.info("%s: compiling its layers; takes half a minute, the first time", config.model)
    return compile_layers(
        config.model,
        layers,
        lambda num_rows: probe_logits(model, text_config, ShapeProbe(), num_rows),
        tolerance,
        recorded_seconds(device) if config.compile_layers is None else None,
    )


def _localize(
    name: str, model: Any, text_config: Any, dtype: torch.dtype, plan: dict[str, str], group: ProcessGroup
) -> None:
    """Put local layers in place of transformers' distributed ones.

    Raises UnsupportedModelError if they do not compute the same.
    """
    expected = None if is_own(plan, text_config) else probe_logits(model, text_config, ShapeProbe())
    localize(model, plan, group)
    if expected is None:
        return
    actual = probe_logits(model, text_config, ShapeProbe())
    model.set_attn_implementation(ATTENTION_NAME)
    rounded, otherwise = (probe_logits(model, text_config, ShapeProbe(is_wide=is_wide)) for is_wide in (False, True))
    # Rank 0 has the logits of the whole vocabulary.
    error = logits_difference(actual, expected) if group.rank == 0 else 0.0
    if not group.minimum(error <= rounding_tolerance(rounded, otherwise, dtype)):
        raise UnsupportedModelError(
            f"{name!r} ({text_config.model_type}) gives other logits with this engine's sharded layers than with "
            f"transformers' (relative difference {error:.1e} on rank {group.rank}); use tensor_parallel_size 1",
            param="tensor_parallel_size",
        )


def _eos_token_ids(location: str, text_config: Any) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's if there is one, else the config's."""
    try:
        eos = GenerationConfig.from_pretrained(location).eos_token_id
    except OSError:
        eos = None
    if eos is None:
        eos = getattr(text_config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)
