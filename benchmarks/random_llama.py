"""A Llama with random weights, for measurements in which only shapes matter."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCAB_SIZE = 2048


def save_random_llama(folder: Path, *, hidden: int, layers: int, vocab_size: int = VOCAB_SIZE) -> None:
    """Write config and weights to `folder`; no tokenizer. hidden: a multiple of 64, the size of a head."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
