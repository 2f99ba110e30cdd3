"""Makes adapters in peft's format, of random weights, and models into which such an adapter is merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from engine.executor.lora.peft_config import read_peft_config
from engine.executor.lora.peft_files import PREFIX, A, B


def save_adapter(model: Path, folder: Path, seed: int, targets: object, size: float = 0.1, **fields: object) -> Path:
    """An adapter of a model in a new folder. size: of its weights, large enough to change answers."""
    layers = linear_layers(AutoModelForCausalLM.from_pretrained(model))
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    read, _ = read_peft_config(folder, layers)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in sorted(read.targets):
        rank, (num_in, num_out) = read.rank_of(name), layers[name]
        tensors[f"{PREFIX}{name}{A}"] = size * torch.randn(rank, num_in, generator=generator)
        tensors[f"{PREFIX}{name}{B}"] = size * torch.randn(num_out, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merge_adapter(model: Path, adapter: Path, folder: Path, scales: float | Mapping[str, float]) -> Path:
    """A copy of the model whose weights are W + scale * B @ A.

    scales: of all layers, or by name.
    """
    merged = AutoModelForCausalLM.from_pretrained(model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if not name.endswith(A):
            continue
        layer = name.removeprefix(PREFIX).removesuffix(A)
        scale = scales if isinstance(scales, float) else scales[layer]
        change = scale * tensors[name.replace(A, B)] @ tensors[name]
        module = merged.get_submodule(layer)
        with torch.no_grad():
            module.weight += change.T if isinstance(module, Conv1D) else change
    merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of those that an adapter may change."""
    return {
        name: (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    }
