"""Quantised weights: how far off they are, that rows do not touch each other, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.config import EngineConfig
from engine.errors import ConfigError, UnsupportedModelError
from engine.executor import model_loader, quantized_linear
from engine.executor.compiled_layers import logits_difference
from engine.executor.model_check import probe_logits
from engine.executor.model_loader import ShapeProbe, load_model
from engine.executor.packed_linear import FbgemmWeight, OneDnnWeight, PlainWeight, is_right, pack_linears
from engine.executor.quantization import quantize
from engine.executor.quantized_linear import Int8Weight, choose_quantized

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def has_int8() -> bool:
    return choose_quantized("auto", torch.float32, CPU) is not None


pytestmark = pytest.mark.skipif(not has_int8(), reason="this torch does not multiply 8-bit weights")


def load(folder: Path, **options: object) -> model_loader.LoadedModel:
    return load_model(EngineConfig.from_options({"model": str(folder), "dtype": "float32", **options}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_int8_rounds_each_weight_to_a_254th_of_the_range_of_its_output(dtype):
    torch.manual_seed(0)
    weight, bias = (
        torch.randn(40, 64, dtype=dtype) * torch.arange(1, 41)[:, None].to(dtype),
        torch.randn(40, dtype=dtype),
    )
    packed = Int8Weight(weight, bias)
    step = weight.float().abs().amax(dim=1, keepdim=True) / 127
    assert ((packed.unpack() - weight.float()).abs() <= step * 0.501).all()
    x = torch.randn(9, 64, dtype=dtype)
    exact = nn.functional.linear(x.float(), packed.unpack(), bias.float())
    out = packed.multiply(x)
    assert out.dtype == dtype
    assert (out.float() - exact).norm() <= 0.02 * exact.norm()


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    packed = Int8Weight(torch.randn(40, 64), torch.randn(40))
    x = torch.randn(70, 64)
    x[3] *= 1e4  # would take the precision of all, with one scale for them
    x[5] = 0
    together = packed.multiply(x)
    assert torch.equal(together[5], packed._bias)
    for rows in (slice(0, 1), slice(4, 9), slice(60, 70)):
        assert torch.equal(packed.multiply(x[rows]), together[rows])
    x[7, 0] = torch.nan
    others = [row for row in range(70) if row != 7]
    assert packed.multiply(x)[7].isnan().all()
    assert torch.equal(packed.multiply(x)[others], together[others])
    assert packed.multiply(x[:0]).shape == (0, 40)


@torch.inference_mode()
def test_it_can_be_copied():
    weight = torch.randn(8, 16)
    packed = Int8Weight(weight, None)
    x = torch.randn(3, 16)
    assert torch.equal(copy.deepcopy(packed).multiply(x), packed.multiply(x))
    assert packed.num_bytes == 8 * 16 + 8 * 4


@torch.inference_mode()
def test_a_layer_that_would_lose_too_much_keeps_its_dtype(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    monkeypatch.setattr(Int8Weight, "LOSS", 1e-5)
    x = torch.randn(5, 64)
    expected = model(x)
    assert pack_linears(model, lambda: model(x), Int8Weight, OneDnnWeight) == 0
    assert [type(layer._packed) for layer in model] == [OneDnnWeight] * 2
    torch.testing.assert_close(model(x), expected)


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

    assert quantize("tiny", model, model.config, NarrowWeight, otherwise)
    assert {type(layer.mlp.down_proj._packed) for layer in model.model.layers} == {PlainWeight}
    assert type(model.model.layers[0].self_attn.o_proj._packed) is NarrowWeight


@pytest.mark.parametrize("error", [NotImplementedError(), AttributeError("no such operation\nin this build")])
def test_a_torch_without_the_operations_is_told_apart(error, monkeypatch):
    def fail(*_: object) -> bool:
        raise error

    monkeypatch.setattr(quantized_linear, "is_right", fail)
    assert choose_quantized("auto", torch.float32, CPU) is None
    with pytest.raises(ConfigError, match=r"on this processor \((NotImplementedError|no such operation)\)"):
        choose_quantized("int8", torch.float32, CPU)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
def test_any_family_is_quantised(family, tiny_model, caplog):
    caplog.set_level("INFO")
    plain, quantised = load(tiny_model(family)), load(tiny_model(family), quantization="int8")
    logits = [probe_logits(each.model, each.model.config, ShapeProbe(), 24) for each in (plain, quantised)]
    assert 1e-5 < logits_difference(logits[1], logits[0]) < 0.1
    assert "linear layers quantised (Int8Weight)" in caplog.text
    assert quantised.num_weight_bytes < plain.num_weight_bytes
    assert not any(type(module).__name__ == "Conv1D" for module in quantised.model.modules())


def test_kv_of_other_weights_is_another_models(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    fingerprints = {load(folder, quantization=kind).fingerprint for kind in ("none", "int8")}
    monkeypatch.setattr(quantized_linear, "INPUT_LIMIT", 63)
    monkeypatch.setattr(Int8Weight, "CHECKED_LIMITS", (127, 63))
    fingerprints.add(load(folder, quantization="int8").fingerprint)
    assert len(fingerprints) == 3
    assert load(folder, quantization="auto").fingerprint in fingerprints


def test_what_cannot_be_quantised_is_refused_or_left_as_it_is(tiny_model, monkeypatch):
    with pytest.raises(ConfigError, match="on CPUs only"):
        choose_quantized("int8", torch.bfloat16, torch.device("cuda"))
    assert choose_quantized("auto", torch.bfloat16, torch.device("cuda")) is None
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
