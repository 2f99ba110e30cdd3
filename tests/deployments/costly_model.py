"""A model of random weights whose context takes long to compute for what its KV weighs.

KV is moved only if that is cheaper than to compute it, which the embedded model's hardly is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.embedded_model import embedded_model_path

WEIGHTS = {"model.safetensors"}


def make_costly_model(folder: Path) -> str:
    """Writes it, with the embedded model's tokenizer; the path. Ten million parameters, and 6 KB of KV a token in float32."""
    for file in embedded_model_path().iterdir():
        if file.name not in WEIGHTS:
            shutil.copy(file, folder)
    config = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6})
    config.update({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)
