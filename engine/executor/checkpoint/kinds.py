"""The kinds of quantised checkpoints, by the `quant_method` of their configuration: how their weights are read, or why not.

To teach the engine another one, add it to KINDS, with a format if its files hold weights in a new way. Reads no file.

Weights alone are read so. Inputs that a method would quantise too (W8A8) stay in the model's dtype, nearer to the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.executor.checkpoint.float_weights import (
    bitsandbytes_4bit,
    bitsandbytes_int8,
    mxfp4_experts,
    packed_fp4,
    scaled_bytes,
)
from engine.executor.checkpoint.integer_weights import awq, gptq, packed_integers
from engine.executor.checkpoint.weight_format import Block, WeightFormat

Options = Mapping[str, Any]
CONFIG_NAME = "quantization_config"


@dataclass(frozen=True, slots=True)
class CheckpointKind:
    """How the weights of a quantised checkpoint become those of the model.

    method: as its configuration calls it.
    formats: how its files hold weights, each tried on what those before it have left.
    """

    method: str
    formats: tuple[WeightFormat, ...]


def take_kind(model: str, hf_config: Any) -> CheckpointKind | None:
    """The kind of a checkpoint, of whose configuration nothing says any more that it is quantised; None if it is not.

    Raises ConfigError for one that cannot be loaded, with what to do instead.
    """
    options: Options | None = None
    for config in (hf_config, hf_config.get_text_config()):
        found = getattr(config, CONFIG_NAME, None)
        if found is not None:
            options = found if isinstance(found, dict) else found.to_dict()
            delattr(config, CONFIG_NAME)
    if not options:
        return None
    method = options.get("quant_method")
    method = str(getattr(method, "value", method))
    if options.get("load_in_8bit") or options.get("load_in_4bit"):  # as old versions of transformers wrote it
        method = "bitsandbytes"
    try:
        if method not in KINDS:
            why = REFUSED.get(method, "that method is not known here")
            raise ValueError(f"{why}; what can be loaded is {', '.join(KINDS)}, and GGUF files")
        return CheckpointKind(method, KINDS[method](options))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # of a damaged configuration, too
        raise ConfigError(
            f"{model!r} is a checkpoint that is quantised with {method}, and is not loaded: {error}. Take the checkpoint "
            "that it was made from (`quantization: int8` makes that small), or one of another kind",
            param="model",
        ) from error


def _gptq(options: Options) -> tuple[WeightFormat, ...]:
    name = options.get("checkpoint_format") or options.get("format") or "gptq"
    _check("checkpoint_format", name, ("gptq", "gptq_v2"))
    _check("bits", options.get("bits"), (2, 4, 8))
    _check("pack_dtype", options.get("pack_dtype", "int32"), ("int32",))
    return (gptq(is_v1=name == "gptq", group_size=_group_size(options)),)


def _awq(options: Options) -> tuple[WeightFormat, ...]:
    _check("version", str(options.get("version", "gemm")).lower(), ("gemm",))
    _check("bits", options.get("bits", 4), (4,))
    _check("zero_point", options.get("zero_point", True), (True,))
    return (awq(group_size=_group_size(options)),)


def _compressed_tensors(options: Options) -> tuple[WeightFormat, ...]:
    if options.get("transform_config"):
        raise ValueError("it turns inputs around as it computes (transform_config)")
    sparsity = options.get("sparsity_config") or {}
    _check("format of sparsity_config", sparsity.get("format", "dense"), ("dense",))
    groups = (options.get("config_groups") or {}).values()
    for name in (options.get("format"), *(group.get("format") for group in groups)):
        _check("format", name, (None, *COMPRESSED_FORMATS))
    blocks: list[Block] = []
    for weights in (group.get("weights") or {} for group in groups):
        if (size := weights.get("group_size") or 0) > 0:
            blocks.append((1, size))
        if weights.get("block_structure"):
            blocks.append(_block(weights["block_structure"]))
    return (
        packed_integers(blocks),
        packed_fp4("weight_packed", "weight_global_scale", is_divisor=True),
        packed_fp4("weight_packed", None),
        scaled_bytes("weight_scale", blocks),
    )


def _fp8(options: Options) -> tuple[WeightFormat, ...]:
    block = options.get("weight_block_size")
    blocks = [_block(block)] if block else []
    return scaled_bytes("weight_scale_inv", blocks), scaled_bytes("weight_scale", blocks)


def _mxfp8(options: Options) -> tuple[WeightFormat, ...]:
    return (scaled_bytes("weight_scale_inv", [_block(options.get("weight_block_size") or (1, 32))]),)


def _modelopt(options: Options) -> tuple[WeightFormat, ...]:
    _check("quant_algo", options.get("quant_algo"), ("FP8", "NVFP4"))
    return packed_fp4("weight", "weight_scale_2"), scaled_bytes("weight_scale", [])


def _bitsandbytes(_options: Options) -> tuple[WeightFormat, ...]:
    return bitsandbytes_4bit("nf4"), bitsandbytes_4bit("fp4"), bitsandbytes_int8()


def _mxfp4(_options: Options) -> tuple[WeightFormat, ...]:
    return mxfp4_experts("gate_up_proj"), mxfp4_experts("down_proj")


def _torchao(options: Options) -> tuple[WeightFormat, ...]:
    blocks: list[Block] = []

    def visit(value: Any) -> None:
        if not isinstance(value, dict):
            return
        kind = str(value.get("_type", ""))
        if kind.endswith("Config"):
            _check("quant_type", kind, TORCHAO_CONFIGS)
        if kind == "IntxPackingFormat":
            _check("intx_packing_format", value.get("_data"), ("UNPACKED_TO_INT8",))
        if isinstance(size := value.get("group_size"), int) and size > 0:
            blocks.append((1, size))
        if value.get("block_size"):
            blocks.append(_block(value["block_size"]))
        for each in value.values():
            visit(each)

    visit(options.get("quant_type"))
    return (scaled_bytes("_weight_scale", blocks, values="_weight_qdata", zero_point="_weight_zero_point"),)


def _group_size(options: Options) -> int:
    size = options.get("group_size")
    if not isinstance(size, int) or not (size == -1 or size > 0):
        raise ValueError(f"its group_size is {size!r}, and no number of input features")
    return size


def _block(value: Any) -> Block:
    """[rows, columns], or "128x128" as older files have it."""
    try:
        rows, columns = map(int, value.split("x") if isinstance(value, str) else value)
        if min(rows, columns) > 0:
            return rows, columns
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"its blocks are {value!r}, which are not two numbers of features")


def _check(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(
            f"its {name} is {value!r}, but only {' or '.join(str(each) for each in known if each)} can be read"
        )


COMPRESSED_FORMATS = (
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
TORCHAO_CONFIGS = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "IntxWeightOnlyConfig",
    "Int8DynamicActivationIntxWeightConfig",
)
KINDS: dict[str, Callable[[Options], tuple[WeightFormat, ...]]] = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "mxfp8": _mxfp8,
    "torchao": _torchao,
}
# Of those that transformers knows, what stands in the way.
REFUSED = {
    "auto-round": "its files are read when they are exported in the format of GPTQ or AWQ (`auto_gptq`, `auto_awq`)",
    "nvfp4": "transformers quantises so as it loads, and has no files of it",
    **dict.fromkeys(
        ("aqlm", "vptq", "spqr", "quip", "higgs"),
        "its weights are places in tables of vectors, which nothing here reads",
    ),
    **dict.fromkeys(
        ("hqq", "quanto", "eetq", "quark", "bitnet", "fp_quant", "sinq", "fouroversix"), "nothing here reads it"
    ),
}
