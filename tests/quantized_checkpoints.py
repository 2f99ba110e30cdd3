"""Writes random weights as quantised checkpoints hold them, by the specification of each kind, and as they are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GROUP = 32
BLOCK = (40, 48)  # divides no side of the layers
SCALE = 0.03
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4 = torch.cat([FP4, -FP4])
# Where the eight columns of a word lie, by AWQ.
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]

Parts = dict[str, torch.Tensor]
# (out_features, in_features) -> the tensors of a layer, and its weight.
Writer = Callable[[int, int], tuple[Parts, torch.Tensor]]


def write_quantized(
    plain: Path, folder: Path, kind: str, *, num_files: int = 1, is_quantized: Callable[[str], bool] | None = None
) -> tuple[Path, Path]:
    """Folders of a checkpoint with random weights of that kind, and of one that has those weights as they are.

    plain: a model's folder, for everything else.
    is_quantized: which weights are, by name; None = those of linear layers whose names end with _proj.
    """
    torch.manual_seed(0)
    options, write = KINDS[kind]
    is_quantized = is_quantized or (lambda name: name.endswith("_proj.weight"))
    stored: Parts = {}
    weights: Parts = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if is_quantized(name):
            layer = name.removesuffix("weight")
            parts, weights[name] = write(*tensor.shape)
            stored |= {layer + part: content for part, content in parts.items()}
        else:
            stored[name] = weights[name] = tensor
    quantized, dense = folder / "quantized", folder / "dense"
    for made in (quantized, dense):
        shutil.copytree(plain, made, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((plain / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": options}))
    save_file(_contiguous(weights), dense / "model.safetensors", metadata={"format": "pt"})
    write_files(stored, quantized, num_files)
    return quantized, dense


def write_files(tensors: Parts, folder: Path, num_files: int = 1) -> None:
    """A checkpoint's weights, spread over files so that the parts of one lie in several."""
    if num_files == 1:
        save_file(_contiguous(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    files: dict[str, Parts] = {}
    for number, name in enumerate(sorted(tensors)):
        files.setdefault(f"model-{number % num_files}.safetensors", {})[name] = tensors[name]
    for file, content in files.items():
        save_file(_contiguous(content), folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, content in files.items() for name in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _contiguous(tensors: Parts) -> Parts:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def to_words(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[..., n] -> [..., ceil(n * num_bits / 32)] (int32), the first code in the lowest bits."""
    per_word = 32 // num_bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    values = codes.numpy().astype(np.uint64).reshape(*codes.shape[:-1], -1, per_word)
    words = (values << (np.arange(per_word, dtype=np.uint64) * num_bits)).sum(-1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def to_bytes(codes: torch.Tensor, *, low_first: bool = True) -> torch.Tensor:
    """4-bit codes [..., n] -> [..., n / 2]."""
    first, second = codes[..., ::2].to(torch.uint8), codes[..., 1::2].to(torch.uint8)
    return first | second << 4 if low_first else second | first << 4


def _groups(out: int, num: int) -> torch.Tensor:
    return (SCALE * (0.5 + torch.rand(out, num))).half().float()


def _each(grid: torch.Tensor, size: int) -> torch.Tensor:
    return grid.repeat_interleave(size, 1)


def _gptq(num_bits: int, *, is_v1: bool, is_sorted: bool = True) -> Writer:
    def write(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
        num_groups = num_in // GROUP
        codes = torch.randint(1 << num_bits, (out, num_in))
        zeros = torch.randint(1, 1 << num_bits, (out, num_groups))
        scales = _groups(out, num_groups)
        g_idx = torch.arange(num_in) // GROUP
        g_idx = g_idx if is_sorted else g_idx[torch.randperm(num_in)]
        weight = (codes - zeros[:, g_idx]) * scales[:, g_idx]
        parts = {
            "qweight": to_words(codes, num_bits).T,
            "qzeros": to_words(zeros.T - int(is_v1), num_bits),
            "scales": scales.T.half(),
            "g_idx": g_idx.int(),
        }
        return parts, weight

    return write


def _awq(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
    codes, zeros = torch.randint(16, (out, num_in)), torch.randint(16, (out, num_in // GROUP))
    scales = _groups(out, num_in // GROUP)

    def pack(columns: torch.Tensor) -> torch.Tensor:  # [rows, out]
        placed = torch.empty_like(columns).view(len(columns), -1, 8)
        placed[..., AWQ_PLACES] = columns.view(len(columns), -1, 8)
        return to_words(placed.flatten(1), 4)

    parts = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales.T.half()}
    return parts, (codes - _each(zeros, GROUP)) * _each(scales, GROUP)


def _packed(*, is_symmetric: bool, num_bits: int = 4) -> Writer:
    def write(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
        half = 1 << num_bits - 1
        codes, scales = torch.randint(-half, half, (out, num_in)), _groups(out, num_in // GROUP)
        zeros = torch.zeros_like(scales).long() if is_symmetric else torch.randint(-half, half, scales.shape)
        parts = {
            "weight_packed": to_words(codes + half, num_bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([out, num_in]),
        }
        if not is_symmetric:
            parts["weight_zero_point"] = to_words((zeros + half).T, num_bits).T
        return parts, (codes - _each(zeros, GROUP)) * _each(scales, GROUP)

    return write


def _int8_rows(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
    codes, scales = torch.randint(-128, 128, (out, num_in)), _groups(out, 1) / 16
    return {"weight": codes.to(torch.int8), "weight_scale": scales}, codes * scales


def _float8(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


def _float8_blocks(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
    codes = _float8((out, num_in))
    scales = 0.1 + 0.1 * torch.rand(math.ceil(out / BLOCK[0]), math.ceil(num_in / BLOCK[1]))
    rows, columns = torch.arange(out) // BLOCK[0], torch.arange(num_in) // BLOCK[1]
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * scales[rows][:, columns]


def _float8_rows(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
    codes, scales = _float8((out, num_in)), 0.1 + 0.1 * torch.rand(out, 1)
    return {"weight": codes, "weight_scale": scales, "input_scale": torch.ones(1)}, codes.float() * scales


def _float8_whole(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
    codes, scale = _float8((out, num_in)), torch.tensor(0.17)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale


def _mxfp8(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
    codes, exponents = _float8((out, num_in)), torch.randint(122, 126, (out, num_in // 32))
    parts = {"weight": codes, "weight_scale_inv": exponents.to(torch.uint8)}
    return parts, codes.float() * _each(2.0 ** (exponents - 127), 32)


def _fp4(group: int, scales_of: Callable[[int, int], tuple[Parts, torch.Tensor]], values: str) -> Writer:
    def write(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
        codes = torch.randint(16, (out, num_in))
        parts, scales = scales_of(out, num_in // group)
        return {values: to_bytes(codes), **parts}, FP4[codes] * _each(scales, group)

    return write


def _nvfp4_divided(out: int, num: int) -> tuple[Parts, torch.Tensor]:
    scales, whole = (100 * torch.rand(out, num) + 1).to(torch.float8_e4m3fn), torch.tensor([1000.0])
    return {"weight_scale": scales, "weight_global_scale": whole}, scales.float() / whole


def _nvfp4_multiplied(out: int, num: int) -> tuple[Parts, torch.Tensor]:
    scales, whole = (100 * torch.rand(out, num) + 1).to(torch.float8_e4m3fn), torch.tensor(0.001)
    return {"weight_scale": scales, "weight_scale_2": whole}, scales.float() * whole


def _exponents(out: int, num: int) -> tuple[Parts, torch.Tensor]:
    exponents = torch.randint(121, 125, (out, num))
    return {"weight_scale": exponents.to(torch.uint8)}, 2.0 ** (exponents - 127)


def _nf4_nested(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
    size, nested_size = 64, 32
    table, nested_table = torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16) ** 2, torch.linspace(-1, 1, 256)
    codes = torch.randint(16, (out * num_in,))
    num = math.ceil(out * num_in / size)
    scale_codes = torch.randint(256, (num,))
    nested = 0.05 * torch.rand(math.ceil(num / nested_size))
    scales = nested_table[scale_codes] * nested[torch.arange(num) // nested_size] + 0.2
    state = {
        "quant_type": "nf4",
        "blocksize": size,
        "dtype": "float32",
        "shape": [out, num_in],
        "nested_blocksize": nested_size,
        "nested_dtype": "float32",
        "nested_offset": 0.2,
    }
    parts = {
        "weight": to_bytes(codes, low_first=False)[:, None],
        "weight.absmax": scale_codes.to(torch.uint8),
        "weight.quant_map": table,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": nested_table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return parts, (table[codes] * scales[torch.arange(out * num_in) // size]).view(out, num_in)


def _bitsandbytes_int8(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
    codes, largest = torch.randint(-127, 128, (out, num_in)), 0.2 + 0.2 * torch.rand(out)
    parts = {"weight": codes.to(torch.int8), "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes * (largest[:, None] / 127)


def _torchao(out: int, num_in: int) -> tuple[Parts, torch.Tensor]:
    codes, scales = torch.randint(-8, 8, (out, num_in)), _groups(out, num_in // GROUP)
    zeros = torch.randint(-8, 8, scales.shape)
    parts = {"qdata": codes.to(torch.int8), "scale": scales, "zero_point": zeros.to(torch.int8)}
    weight = (codes - _each(zeros, GROUP)) * _each(scales, GROUP)
    return {f"_weight_{part}": content for part, content in parts.items()}, weight


def _compressed(name: str, group: int | None = None, structure: list[int] | None = None) -> dict[str, Any]:
    weights = {"num_bits": 4, "group_size": group, "block_structure": structure}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "kv_cache_scheme": None,
    }


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
_AO = {
    "default": {
        "_type": "IntxWeightOnlyConfig",
        "_data": {
            "granularity": {"_type": "PerGroup", "_data": {"group_size": GROUP}},
            "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        },
    }
}
KINDS: dict[str, tuple[dict[str, Any], Writer]] = {
    "gptq": (_GPTQ, _gptq(4, is_v1=True)),
    "gptq v2": ({**_GPTQ, "checkpoint_format": "gptq_v2"}, _gptq(4, is_v1=False)),
    "gptq desc_act": ({**_GPTQ, "desc_act": True}, _gptq(4, is_v1=True, is_sorted=False)),
    "gptq 2 bits": ({**_GPTQ, "bits": 2}, _gptq(2, is_v1=True)),
    "gptq 8 bits": ({**_GPTQ, "bits": 8}, _gptq(8, is_v1=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, _awq),
    "compressed int8": (_compressed("int-quantized"), _int8_rows),
    "compressed int4": (_compressed("pack-quantized", GROUP), _packed(is_symmetric=True)),
    "compressed int4 with zero points": (_compressed("pack-quantized", GROUP), _packed(is_symmetric=False)),
    "compressed int8 packed": (_compressed("pack-quantized", GROUP), _packed(is_symmetric=False, num_bits=8)),
    "compressed float8": (_compressed("float-quantized"), _float8_rows),
    "compressed nvfp4": (_compressed("nvfp4-pack-quantized", 16), _fp4(16, _nvfp4_divided, "weight_packed")),
    "compressed mxfp4": (_compressed("mxfp4-pack-quantized", 32), _fp4(32, _exponents, "weight_packed")),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": list(BLOCK)}, _float8_blocks),
    "fp8 whole": ({"quant_method": "fp8", "activation_scheme": "static"}, _float8_whole),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, _float8_rows),
    "mxfp8": ({"quant_method": "mxfp8"}, _mxfp8),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, _fp4(16, _nvfp4_multiplied, "weight")),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, _float8_whole),
    "bitsandbytes nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, _nf4_nested),
    "bitsandbytes int8": ({"load_in_8bit": True}, _bitsandbytes_int8),
    "torchao": ({"quant_method": "torchao", "quant_type": _AO}, _torchao),
}
