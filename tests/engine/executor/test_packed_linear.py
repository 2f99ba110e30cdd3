"""Packed weights compute what the layers did, share one multiplication where the input is one, and leave nothing behind."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from engine.config import EngineConfig
from engine.errors import DeviceFailedError
from engine.executor import model_check, model_loader, packed_linear
from engine.executor.model_loader import load_model
from engine.executor.packed_linear import (
    FbgemmWeight,
    JoinedLinear,
    OneDnnWeight,
    PackedLinear,
    PlainWeight,
    choose_packing,
    pack_linears,
    unpack_linears,
)

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    choose_packing(torch.float32, CPU) is None, reason="this torch has no packed multiplication"
)


class Attention(nn.Module):
    """Q, K and V of one input; the output layer of another."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(24, 32, bias=bias)
        self.k = nn.Linear(24, 16)
        self.v = nn.Linear(24, 16, bias=bias)
        self.out = nn.Linear(32, 24, bias=bias)
        self.unused = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(q * k.repeat(1, 2) + v.repeat(1, 2))


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_layers_on_one_input_are_joined_and_compute_the_same(bias):
    torch.manual_seed(0)
    model = Attention(bias=bias)
    x = torch.randn(5, 24)
    expected = model(x)
    weights = {name: getattr(model, name).weight.clone() for name in ("q", "k", "v", "out")}
    assert pack_linears(model, lambda: model(x), OneDnnWeight) == 4
    assert [type(getattr(model, name)) for name in ("q", "k", "v", "out", "unused")] == [
        *[JoinedLinear] * 3,
        PackedLinear,
        nn.Linear,
    ]
    for rows in (1, 5, 70):
        y = torch.randn(rows, 24)
        torch.testing.assert_close(model(y), model(y.clone()))
    torch.testing.assert_close(model(x), expected)
    for name, weight in weights.items():
        assert torch.equal(getattr(model, name).weight, weight)
        assert getattr(model, name).weight.dtype == torch.float32


@torch.inference_mode()
def test_on_a_gpu_layers_are_joined_and_others_stay(tiny_model, monkeypatch):
    """And all weights are the model's parameters still, once each."""
    assert choose_packing(torch.bfloat16, torch.device("cuda")) is PlainWeight
    plain = load_model(EngineConfig(model=str(tiny_model("llama")), dtype="float32", pack_weights=False))
    monkeypatch.setattr(model_loader, "choose_packing", lambda dtype, device: PlainWeight)
    loaded = load_model(EngineConfig(model=str(tiny_model("llama")), dtype="float32"))
    names = [name for name, module in loaded.model.named_modules() if isinstance(module, JoinedLinear)]
    assert {name.rsplit(".", 1)[1] for name in names} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert type(loaded.model.lm_head) is nn.Linear
    assert sum(p.nbytes for p in loaded.model.parameters()) == sum(p.nbytes for p in plain.model.parameters())
    logits = [
        model_check.probe_logits(each.model, each.model.config, model_loader.ShapeProbe(), 7)
        for each in (loaded, plain)
    ]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_members_may_be_called_in_any_order_and_on_different_inputs():
    torch.manual_seed(0)
    model = Attention()
    x, y = torch.randn(2, 3, 24)
    expected = {(name, which): getattr(model, name)(t) for name in "qkv" for which, t in (("x", x), ("y", y))}
    pack_linears(model, lambda: model(x), OneDnnWeight)
    for name, which in [("v", "x"), ("q", "x"), ("k", "y"), ("k", "x"), ("q", "x"), ("q", "y"), ("q", "y"), ("v", "y")]:
        actual = getattr(model, name)(x if which == "x" else y)
        torch.testing.assert_close(actual, expected[name, which])


@torch.inference_mode()
def test_layers_that_are_called_by_keyword_are_packed_too():
    class ByKeyword(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.q(input=x) * self.k(input=x).repeat(1, 2))

    model, x = ByKeyword(), torch.randn(5, 24)
    expected = model(x)
    assert pack_linears(model, lambda: model(x), OneDnnWeight) == 3
    torch.testing.assert_close(model(x), expected)


def test_a_processor_with_bfloat16_uses_it(monkeypatch):
    """Weights that come back in their own dtype, as oneDNN's do, count as packed."""

    class NativeWeight:
        PACKS_SINGLE_LAYERS = True
        CHECKED_LIMITS = (2, 1)
        LOSS = 0.0

        def __init__(self, weight, bias):
            self.weight, self.bias = weight, bias

        def multiply(self, x):
            return x @ self.weight.T + self.bias

        def unpack(self):
            return self.weight

    monkeypatch.setattr(packed_linear, "OneDnnWeight", NativeWeight)
    assert choose_packing(torch.bfloat16, CPU) is NativeWeight


WRONG_LAYOUTS = {
    "rows in pairs": lambda weight: weight.view(-1, 2, weight.shape[1]).flip(1).reshape(weight.shape),
    "columns in pairs": lambda weight: weight.view(weight.shape[0], -1, 2).flip(2).reshape(weight.shape),
    "transposed": lambda weight: weight.T.reshape(weight.shape),
}


@pytest.mark.parametrize("layout", list(WRONG_LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layout_that_is_wrong_on_this_machine_packs_nothing(layout, dtype, monkeypatch, caplog):
    """One that multiplies in another order than it unpacks: constants would not show it."""

    class WrongWeight(PlainWeight):
        def multiply(self, x):
            return nn.functional.linear(x, WRONG_LAYOUTS[layout](self._weight), self._bias)

    for name in ("OneDnnWeight", "FbgemmWeight"):
        monkeypatch.setattr(packed_linear, name, WrongWeight)
    assert choose_packing(dtype, CPU) is None
    assert "is wrong on this machine" in caplog.text
    model = Attention().to(dtype)
    with torch.inference_mode(), pytest.raises(ValueError, match="does not compute the same"):
        pack_linears(model, lambda: model(torch.randn(5, 24).to(dtype)), WrongWeight)


def test_layers_of_zeros_are_packed():
    model = Attention()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with torch.inference_mode():
        assert pack_linears(model, lambda: model(torch.randn(5, 24)), OneDnnWeight) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@torch.inference_mode()
def test_packed_models_can_be_copied_and_unpacked(device, dtype):
    """The copy has weights of its own. device: whose packing is tried, here."""
    torch.manual_seed(0)
    model, x = Attention(bias=True).to(dtype), torch.randn(5, 24).to(dtype)
    packing = choose_packing(dtype, torch.device(device))
    assert packing is not None
    pack_linears(model, lambda: model(x), packing)
    expected = model(x)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(other(x), expected)
    weights = {name: getattr(other, name).weight for name in ("q", "k", "v", "out")}
    unpack_linears(other)
    assert {type(module) for module in other.children()} == {nn.Linear}
    assert all(torch.equal(getattr(other, name).weight, weight) for name, weight in weights.items())
    torch.testing.assert_close(other(x), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(other.float()(x.float()), expected.float(), atol=3e-2, rtol=3e-2)


@torch.inference_mode()
def test_unpacked_weights_and_inputs_are_not_kept():
    model = Attention()
    x = torch.randn(5, 24)
    weights = [weakref.ref(getattr(model, name).weight) for name in ("q", "k", "v", "out")]
    pack_linears(model, lambda: model(torch.randn(5, 24)), OneDnnWeight)
    model(x)
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4
    assert reference() is None


@torch.inference_mode()
def test_a_layer_that_is_called_twice_is_packed_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x) + self.a(2 * x)

    model, x = Twice(), torch.randn(3, 8)
    expected = model(x)
    assert pack_linears(model, lambda: model(x), OneDnnWeight) == 2
    assert isinstance(model.a, PackedLinear)
    assert isinstance(model.b, PackedLinear)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "opt", "mixtral"])
def test_families_join_their_qkv(family, tiny_model):
    loaded = load_model(EngineConfig(model=str(tiny_model(family)), dtype="float32"))
    joined = [name for name, module in loaded.model.named_modules() if isinstance(module, JoinedLinear)]
    assert sum(name.endswith(("q_proj", "k_proj", "v_proj")) for name in joined) == 9  # 3 layers
    plain = load_model(EngineConfig(model=str(tiny_model(family)), dtype="float32", pack_weights=False))
    assert loaded.num_parameters == plain.num_parameters
    assert not any(isinstance(module, JoinedLinear | PackedLinear) for module in plain.model.modules())


@pytest.mark.parametrize("fault", ["no such layout", None], ids=["fails", "wrong"])
def test_a_model_that_packing_breaks_is_served_without_it(fault, tiny_model, monkeypatch, caplog):
    def broken(self, x):
        if fault is not None:
            raise RuntimeError(fault)
        return torch.zeros(*x.shape[:-1], sum(self.sizes))

    monkeypatch.setattr(PackedLinear, "forward", broken)
    read, models, num_alive = model_loader._read_model, weakref.WeakSet(), []

    def counted(*args):
        num_alive.append(len(models))
        model = read(*args)
        models.add(model)
        return model

    monkeypatch.setattr(model_loader, "_read_model", counted)
    loaded = load_model(EngineConfig(model=str(tiny_model("llama")), dtype="float32"))
    assert not any(isinstance(module, PackedLinear) for module in loaded.model.modules())
    assert "not served with packed weights" in caplog.text
    assert num_alive == [0, 0], "two of them may not fit"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_is_multiplied_in_float32_where_the_processor_cannot(dtype):
    torch.manual_seed(0)
    model, exact = Attention(bias=True).to(dtype), Attention(bias=True)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    x = torch.randn(5, 24, dtype=dtype)
    expected = exact(x.float())
    weight = model.k.weight.clone()
    pack_linears(model, lambda: model(x), FbgemmWeight)
    out = model(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    assert torch.equal(model.k.weight, weight)
    assert model.k.weight.dtype == dtype


def test_a_weight_that_float16_cannot_hold_leaves_the_model_unpacked(tiny_model, monkeypatch, caplog):
    with pytest.raises(ValueError, match="range of float16"):
        FbgemmWeight(torch.full((4, 4), 1e6, dtype=torch.bfloat16), None)

    def refuse(self, weight, bias):
        raise ValueError("beyond the range")

    monkeypatch.setattr(model_loader, "choose_packing", lambda dtype, device: FbgemmWeight)
    monkeypatch.setattr(FbgemmWeight, "__init__", refuse)
    loaded = load_model(EngineConfig(model=str(tiny_model("llama")), dtype="bfloat16"))
    assert not any(isinstance(module, PackedLinear) for module in loaded.model.modules())
    assert "beyond the range" in caplog.text


def test_dtype_auto_is_bfloat16_where_the_processor_has_it(tiny_model, monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(model_loader, "_has_bfloat16", lambda has=has: has)
        assert load_model(EngineConfig(model=str(tiny_model("llama")), device="cpu")).dtype == dtype


def test_a_broken_device_is_not_taken_for_code_that_cannot_use_packed_weights(monkeypatch):
    """Loading the model again would fail at its first weight."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(device: torch.device) -> None:
        raise DeviceFailedError(f"{device} failed")

    monkeypatch.setattr(model_loader, "choose_packing", lambda dtype, device: PlainWeight)
    monkeypatch.setattr(model_loader, "pack_linears", fail)
    monkeypatch.setattr(model_loader, "check_device", broken)
    with pytest.raises(DeviceFailedError, match="cpu failed"):
        load_model(EngineConfig(dtype="float32", num_threads=1))
