"""The identity of what makes KV: weights, the model's configuration, dtype and code version.

Data that is kept or shared under another identity is not this model's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers

# Bytes that are brought from a device at once.
NUM_BYTES_AT_ONCE = 64 << 20
# Keys that say where a configuration came from, and nothing of the model; the dtype is that of the weights.
NOT_OF_THE_MODEL = (
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation",
)


def fingerprint_weights(hf_config: Any, weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, in hex, of all weights (bytes, names, shapes, dtypes) and of the configuration.

    weights: as loaded, under the names of the checkpoint's modules; on a rank of a group, its own parts.

    The same on each machine, device and start, wherever the files are and however they are cut. Another one if a single
    weight, a value of the configuration or the version of transformers, whose code computes with them, is another. Reads
    all of them once: some seconds for 16 GB on a few cores.
    """
    names = sorted(weights)
    with ThreadPoolExecutor(max(1, torch.get_num_threads()), "fingerprint") as threads:
        digests = list(threads.map(_digest, (weights[name] for name in names)))
    parts = [[name, str(weights[name].dtype), list(weights[name].shape)] for name in names]
    return fingerprint_of(_describe(hf_config), parts, digests)


def fingerprint_random(hf_config: Any, dtype: torch.dtype, device: torch.device) -> str:
    """Of random weights, which torch makes the same each time on a kind of device."""
    return fingerprint_of(_describe(hf_config), "random weights", str(dtype), device.type, torch.__version__)


def fingerprint_of(*parts: Any) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _describe(hf_config: Any) -> dict[str, Any]:
    values = _without_origin(json.loads(hf_config.to_json_string(use_diff=False)))
    return {"config": values, "transformers": transformers.__version__}


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_origin(item) for name, item in value.items() if name not in NOT_OF_THE_MODEL}
    if isinstance(value, list):
        return [_without_origin(item) for item in value]
    return value


@torch.inference_mode()
def _digest(weight: torch.Tensor) -> str:
    digest = hashlib.sha256()  # lets other threads run
    for part in weight.contiguous().reshape(-1).view(torch.uint8).split(NUM_BYTES_AT_ONCE):
        digest.update(part.cpu().numpy().data)
    return digest.hexdigest()
