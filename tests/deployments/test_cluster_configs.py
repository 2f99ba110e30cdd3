"""The examples in cluster_configs say how much memory a rank needs: the same figures, computed.

From the models' own code (on the meta device) and from the plans that shard them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from deployments.schema import AppArgs, check_serve_config
from engine.sizing import measure_config

FOLDER = Path(__file__).parents[2] / "cluster_configs"
GIB, KIB = 2**30, 2**10
USABLE_GIB, ACTIVATIONS_GIB = 71, 3

LLAMA_70B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
# file -> family and the shape that its model's config.json gives
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_3_1_8b.yaml": (
        "llama",
        {
            **LLAMA_70B,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "llama_3_1_70b.yaml": ("llama", LLAMA_70B),
    "llama_3_1_70b_dp2_tp4.yaml": ("llama", LLAMA_70B),
    "opt_66b.yaml": (
        "opt",
        {
            "vocab_size": 50272,
            "hidden_size": 9216,
            "word_embed_proj_dim": 9216,
            "ffn_dim": 36864,
            "num_hidden_layers": 64,
            "num_attention_heads": 72,
            "max_position_embeddings": 2048,
        },
    ),
    "qwen3_30b_a3b.yaml": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
}

WITHOUT_ARITHMETIC = ("autoscaling.yaml", "two_models.yaml")


def about(num_tokens: float) -> str:
    return f"{num_tokens / 1e6:.1f}M" if num_tokens >= 1e6 else f"{num_tokens / 1e3:.0f}k"


def test_every_example_is_known_here() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == {*MODELS, *WITHOUT_ARITHMETIC}


@pytest.mark.parametrize("name", WITHOUT_ARITHMETIC)
def test_a_recipe_can_be_deployed(name: str) -> None:
    assert check_serve_config(FOLDER / name) == []


@pytest.mark.parametrize("name", MODELS)
def test_an_example_is_right_and_so_is_its_arithmetic(name: str) -> None:
    assert check_serve_config(FOLDER / name) == []
    text = (FOLDER / name).read_text()
    args = AppArgs.model_validate(yaml.safe_load(text)["applications"][0]["args"])
    config = args.engine_config
    num_ranks = config.tensor_parallel_size
    family, shape = MODELS[name]
    size = measure_config(AutoConfig.for_model(family, **shape), num_ranks)
    total, rank, kv = size.weight_bytes, size.rank_weight_bytes, size.kv_bytes
    assert size.rank_kv_bytes * num_ranks == kv
    assert config.gpu_memory_utilization * 79 == pytest.approx(USABLE_GIB, abs=0.2)

    said = dict(re.findall(r"^#   (weights|KV|GPU tier|CPU tier) +(.*)$", text, re.MULTILINE))
    assert f"{total / GIB:.1f} GiB" in said["weights"]
    assert said["weights"].endswith(f"{rank / GIB:.1f} GiB")
    assert said["KV"].startswith(f"{kv / KIB:g} KiB")
    assert said["KV"].endswith(f"{kv / num_ranks / KIB:g} KiB a token")
    left_gib = USABLE_GIB - round(rank / GIB, 1) - ACTIVATIONS_GIB
    tier = f"{left_gib:.1f} GiB: {about(left_gib * GIB / (kv / num_ranks))} tokens"
    assert said["GPU tier"].endswith(tier)
    assert said["CPU tier"].endswith(f" {about(config.kv_offloading_size * GIB / kv)} tokens")
    assert config.max_model_len is not None
    assert config.max_model_len * (kv / num_ranks) < left_gib * GIB
    if "max_position_embeddings" in shape:
        assert config.max_model_len <= shape["max_position_embeddings"]
