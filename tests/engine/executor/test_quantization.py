"""Quantised weights of whole models: how far off they are, what gets which, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.config import EngineConfig
from engine.errors import ConfigError, KernelBuildError, UnsupportedModelError
from engine.executor import model_loader, quantized_linear
from engine.executor.compiled_layers import logits_difference
from engine.executor.model_check import probe_logits
from engine.executor.model_loader import ShapeProbe, load_model
from engine.executor.packed_linear import FbgemmWeight, OneDnnWeight, PlainWeight, is_right, pack_linears
from engine.executor.quantization import quantize
from engine.executor.quantized_linear import Int4Weight, Int8Weight, choose_quantized

CPU = torch.device("cpu")
# How far off the logits of a small random model may be.
KINDS = {"int8": (1e-5, 0.1), "int4": (1e-3, 0.5)}


def has_kernel() -> bool:
    return bool(choose_quantized("auto", torch.float32, CPU))


pytestmark = pytest.mark.skipif(not has_kernel(), reason="no compiler")


def load(folder: Path, **options: object) -> model_loader.LoadedModel:
    return load_model(EngineConfig.from_options({"model": str(folder), "dtype": "float32", **options}))


@torch.inference_mode()
def test_a_layer_that_would_lose_too_much_gets_the_next_kind(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in (model[0], model[2]):  # rounded to 4 bits, they are the same
        layer.weight.data = torch.randint(-7, 8, (64, 64)).float()
        layer.weight.data[:, ::32] = 7
    monkeypatch.setattr(Int4Weight, "LOSS", 0.02)
    x = torch.randn(5, 64)
    kinds = (Int4Weight, Int8Weight, OneDnnWeight)
    assert pack_linears(model, lambda: model(x), *kinds, own={model[2]: kinds[1:]}) == 1
    assert [layer.packing for layer in model] == [Int4Weight, Int8Weight, Int8Weight]
    monkeypatch.setattr(Int8Weight, "LOSS", 0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    expected = model(x)
    assert pack_linears(model, lambda: model(x), Int8Weight, OneDnnWeight) == 0
    assert [layer.packing for layer in model] == [OneDnnWeight] * 2
    torch.testing.assert_close(model(x), expected)


@torch.inference_mode()
def test_a_layer_is_judged_by_what_the_model_gives_it():
    """Weights that are small beside their neighbours are lost in 4 bits, which shows if the inputs are those."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    weight[:, 1::2] *= 0.02
    kinds = []
    for first in (0, 1):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        model[0].weight.data = weight.clone()
        x = torch.zeros(5, 64)
        x[:, first::2] = torch.randn(5, 32)
        pack_linears(model, lambda model=model, x=x: model(x), Int4Weight, Int8Weight, OneDnnWeight)
        kinds.append(model[0].packing)
    assert kinds == [Int4Weight, OneDnnWeight]


def test_kv_of_layers_in_other_kinds_is_another_models(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    fingerprint = load(folder, quantization="int4").fingerprint
    assert load(folder, quantization="int4").fingerprint == fingerprint
    monkeypatch.setattr(Int4Weight, "LOSS", 0)  # all of them lose too much
    assert load(folder, quantization="int4").fingerprint != fingerprint


@pytest.mark.parametrize("otherwise", [None, FbgemmWeight])
def test_a_layer_that_nothing_packs_keeps_a_plain_weight(otherwise, tiny_model):
    """All down_proj lose too much; packed in float16 they would, too, and the first has a weight that it cannot hold."""
    model = load(tiny_model("llama"), pack_weights=False).model
    layers = [layer.mlp.down_proj for layer in model.model.layers]
    layers[0].weight.data = layers[0].weight.data.clone()
    layers[0].weight.data[0, 0] = 1e6

    class NarrowWeight(Int8Weight):
        def multiply(self, x: torch.Tensor) -> torch.Tensor:
            return super().multiply(x) * (x.shape[-1] != layers[0].in_features)

    assert quantize("tiny", model, model.config, (NarrowWeight,), otherwise)
    assert {type(layer.mlp.down_proj._packed) for layer in model.model.layers} == {PlainWeight}
    assert type(model.model.layers[0].self_attn.o_proj._packed) is NarrowWeight


def test_a_machine_without_the_kernel_is_told_apart(monkeypatch):
    monkeypatch.setattr(quantized_linear, "is_fast", lambda: False)
    assert choose_quantized("auto", torch.float32, CPU) == ()
    assert choose_quantized("int8", torch.float32, CPU) == (Int8Weight,)

    def fail(*_: object) -> bool:
        raise KernelBuildError("no C++ compiler: install one\nor another")

    monkeypatch.setattr(quantized_linear, "is_right", fail)
    assert choose_quantized("auto", torch.float32, CPU) == ()
    with pytest.raises(ConfigError, match=r"quantization int4 \(no C\+\+ compiler: install one\)"):
        choose_quantized("int4", torch.float32, CPU)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
def test_any_family_is_quantised(family, kind, tiny_model, caplog):
    caplog.set_level("INFO")
    plain, quantised = load(tiny_model(family)), load(tiny_model(family), quantization=kind)
    logits = [probe_logits(each.model, each.model.config, ShapeProbe(), 24) for each in (plain, quantised)]
    least, most = KINDS[kind]
    assert least < logits_difference(logits[1], logits[0]) < most
    assert f"{kind.capitalize()}Weight" in caplog.text
    assert quantised.model.get_output_embeddings().packing is Int8Weight
    assert quantised.num_weight_bytes < plain.num_weight_bytes
    assert not any(type(module).__name__ == "Conv1D" for module in quantised.model.modules())


def test_kv_of_other_weights_is_another_models(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    fingerprints = {load(folder, quantization=kind).fingerprint for kind in ("none", "int8", "int4")}
    monkeypatch.setattr(Int8Weight, "NUM_TERMS", 1)
    fingerprints.add(load(folder, quantization="int8").fingerprint)
    assert len(fingerprints) == 4
    assert load(folder, quantization="auto").fingerprint in fingerprints


def test_what_cannot_be_quantised_is_refused_or_left_as_it_is(tiny_model, monkeypatch):
    for kind in KINDS:
        with pytest.raises(ConfigError, match="on CPUs only"):
            choose_quantized(kind, torch.bfloat16, torch.device("cuda"))
    assert choose_quantized("auto", torch.bfloat16, torch.device("cuda")) == ()
    with pytest.raises(ConfigError, match="none if pack_weights is false"):
        EngineConfig(model="embedded", quantization="int8", pack_weights=False)

    with monkeypatch.context() as patch:
        patch.setattr(model_loader, "quantize", lambda *_: False)
        with pytest.raises(UnsupportedModelError, match="cannot be served with quantization int8"):
            load(tiny_model("llama"), quantization="int8")
        assert load(tiny_model("llama"), quantization="auto").fingerprint == load(tiny_model("llama")).fingerprint

    monkeypatch.setattr(Int8Weight, "multiply", lambda self, x: x @ self.unpack().flip(0).T.to(x.dtype))
    assert not is_right(Int8Weight, torch.float32)
    with pytest.raises(ConfigError, match="wrong products"):
        load(tiny_model("llama"), quantization="int8")
    assert load(tiny_model("llama"), quantization="auto").fingerprint == load(tiny_model("llama")).fingerprint
