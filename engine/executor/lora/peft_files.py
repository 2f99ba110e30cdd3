"""Reads a LoRA adapter from the folder in which peft saved it, and checks that it fits the model, before it is in memory.

Knows no device and no step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import AdapterError
from engine.executor.lora.peft_config import CONFIG_NAME, PeftConfig, read_peft_config

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
# Before the name of the model's own module.
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


class LinearShape(NamedTuple):
    """Of a linear layer of the whole model, however its weight lies in memory."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a linear layer's weight: scale * b @ a.

    a: [rank, in_features]. b: [out_features, rank]. Of an adapter that was just read, both are float32.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter as it lies in its files.

    identity: SHA-256 of its configuration and of the weights as they were read, in hex. KV that was made with it bears that
        name.
    layers: by the names of the model's linear layers.
    """

    identity: str
    layers: Mapping[str, LowRank]


def read_adapter(folder: Path, linears: Mapping[str, LinearShape], max_rank: int) -> PeftAdapter:
    """Read and check an adapter. Raises AdapterError.

    linears: the model's linear layers that an adapter may change, by name.
    max_rank: a larger one is refused. So the model bounds what is read.
    """
    config, content = read_peft_config(folder, linears)
    path = folder / WEIGHTS_NAME
    if not path.exists():
        what = f"has {PICKLED_NAME} alone" if (folder / PICKLED_NAME).exists() else f"has no {WEIGHTS_NAME}"
        raise AdapterError(f"{folder} {what}; save the adapter with safe_serialization=True", param="adapters")
    try:
        layers = _read_layers(path, config, linears, max_rank)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's own: a dtype it cannot convert, no memory
        raise AdapterError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}", param="adapters") from error
    return PeftAdapter(_identity(content, layers), layers)


def _read_layers(
    path: Path, config: PeftConfig, linears: Mapping[str, LinearShape], max_rank: int
) -> dict[str, LowRank]:
    def refuse(why: str) -> AdapterError:
        return AdapterError(f"the adapter in {path.parent} does not fit: {why}", param="adapters")

    layers = {}
    with safe_open(str(path), "pt") as file:
        names = set(file.keys())
        for layer in sorted(config.targets):
            rank, shape = config.rank_of(layer), linears[layer]
            if rank > max_rank:
                raise refuse(f"its rank is {rank} in {layer}, but max_lora_rank is {max_rank}")
            matrices = []
            for ending, wanted in ((A, [rank, shape.in_features]), (B, [shape.out_features, rank])):
                name = f"{PREFIX}{layer}{ending}"
                if name not in names:
                    raise refuse(f"{WEIGHTS_NAME} lacks {name}, although {CONFIG_NAME} targets that layer")
                names.remove(name)
                if (found := file.get_slice(name).get_shape()) != wanted:
                    raise refuse(f"{name} has the shape {found}, but with this model it is {wanted}")
                matrix = file.get_tensor(name)
                # Copied: it lies in the mapped file, which may be overwritten, or cut, while the adapter serves.
                copied = matrix.to(torch.float32, copy=True)
                if not (matrix.is_floating_point() and copied.isfinite().all()):
                    raise refuse(f"the weights of {layer} are not all finite numbers")
                matrices.append(copied)
            a, b = matrices
            layers[layer] = LowRank(a, b, config.scale_of(layer))
        if names:
            raise refuse(
                f"{WEIGHTS_NAME} has {len(names)} tensors that are none of a linear layer that is targeted, such as "
                f"{min(names)[:200]}; embeddings, heads and other modules cannot be changed"
            )
    return layers


def _identity(config: bytes, layers: Mapping[str, LowRank]) -> str:
    """Of what is in memory, not of the file, which may be another one by now."""
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config)
    for name in sorted(layers):
        for matrix in (layers[name].a, layers[name].b):
            digest.update(f"{name} {tuple(matrix.shape)}\n".encode())
            digest.update(matrix.contiguous().numpy())
    return digest.hexdigest()
