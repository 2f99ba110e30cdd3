"""The identity of a model: the same wherever it lies, another one for whatever makes other KV."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.executor import fingerprint as fingerprints
from engine.executor.model_loader import load_model


def identity(folder: Path, **options: object) -> str:
    return load_model(EngineConfig.from_options({"model": str(folder), "dtype": "float32", **options})).fingerprint


@pytest.fixture
def llama(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "llama"))


def change_weight(folder: Path, name: str, index: int, change: float) -> None:
    """One number of one weight."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[index] += change
    save_file(weights, path, {"format": "pt"})


def test_it_is_the_same_wherever_the_files_lie_and_however_they_are_cut(tiny_model, llama, tmp_path):
    expected = identity(tiny_model("llama"))
    assert identity(llama) == expected
    assert identity(llama, pack_weights=False, num_threads=2) == expected
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert identity(tmp_path / "cut") == expected


@pytest.mark.parametrize(
    ("name", "index"),
    [("model.layers.1.mlp.up_proj.weight", 17), ("model.embed_tokens.weight", -1), ("model.norm.weight", 0)],
)
def test_a_single_number_makes_another_model(llama, name, index):
    before = identity(llama)
    change_weight(llama, name, index, 0.25)
    assert identity(llama) != before


def test_what_else_makes_other_kv_makes_another_model(llama, tiny_model, monkeypatch):
    before = identity(llama)
    others = {before, identity(llama, dtype="bfloat16"), identity(tiny_model("qwen3"))}
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints.transformers, "__version__", "5.99.0")
        others.add(identity(llama))
    path = llama / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 1e-3
    path.write_text(json.dumps(config))
    others.add(identity(llama))
    assert len(others) == 5


def test_swapped_weights_of_one_shape_make_another_model(llama):
    before = identity(llama)
    path = llama / "model.safetensors"
    weights = load_file(path)
    a, b = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    weights[a], weights[b] = weights[b], weights[a]
    save_file(weights, path, {"format": "pt"})
    assert identity(llama) != before


def test_large_weights_are_read_to_the_end(monkeypatch):
    monkeypatch.setattr(fingerprints, "NUM_BYTES_AT_ONCE", 64)
    config = AutoConfig.for_model("llama")
    weight = torch.arange(200.0)
    first = fingerprints.fingerprint_weights(config, {"a": weight})
    assert first == fingerprints.fingerprint_weights(config, {"a": weight.clone()})
    weight[-1] = 0
    assert first != fingerprints.fingerprint_weights(config, {"a": weight})
    pair = {"a": torch.zeros(4, 2).T, "b": torch.tensor(1)}
    assert fingerprints.fingerprint_weights(config, pair) == fingerprints.fingerprint_weights(
        config, {"b": torch.tensor(1), "a": torch.zeros(2, 4)}
    )


def test_random_weights_are_known_by_what_makes_them(llama):
    before = identity(llama, load_format="dummy")
    assert before == identity(llama, load_format="dummy") != identity(llama)
    assert before != identity(llama, load_format="dummy", dtype="bfloat16")


async def test_chunks_are_keyed_by_it(llama):
    engine = AsyncEngine(EngineConfig(model=str(llama), dtype="float32", num_gpu_blocks=8, num_threads=1))
    try:
        assert engine._core.cache_config.model == engine._executor.loaded.fingerprint
    finally:
        await engine.shutdown()
