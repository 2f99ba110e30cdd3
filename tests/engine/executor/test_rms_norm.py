"""Normalisations by one call are those of transformers' modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from engine.errors import KernelBuildError
from engine.executor import rms_norm
from engine.executor.rms_norm import RmsNorm, replace_norms

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def make(kind: type[nn.Module], length: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(length)
    norm = kind(length)
    norm.weight = nn.Parameter(0.3 * torch.randn(length) + 0.8)
    return nn.Sequential(norm.to(dtype)).requires_grad_(False)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("length", [5, 64, 577])
@pytest.mark.parametrize(("kind", "scale"), [(LlamaRMSNorm, 0), (Gemma2RMSNorm, 1), (Olmo2RMSNorm, 2)])
def test_it_computes_what_the_module_does(kind, scale, length, dtype):
    model = make(kind, length, dtype)
    original = model[0]
    assert len(replace_norms(model, dtype)) == 1
    assert isinstance(model[0], RmsNorm)
    if dtype == torch.bfloat16 and length > 5:  # in float32 two of the ways are one
        assert model[0].scale == scale
    rows = torch.randn(3, 7, length).to(dtype)
    for x in (rows, 1e-3 * rows, 100 * rows, rows.transpose(0, 1)):
        expected = original(x)
        torch.testing.assert_close(model(x), expected, rtol=TOLERANCE[dtype], atol=1e-6)
        assert model(x).shape == x.shape
    if dtype == torch.bfloat16:
        assert (model(rows) != original(rows)).float().mean() < 0.02


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    """Nor on how many threads share them."""
    model = make(LlamaRMSNorm, 576, dtype)
    replace_norms(model, dtype)
    rows = torch.randn(1, 300, 576).to(dtype)
    torch.set_num_threads(2)
    try:
        together = model(rows)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(together[:, i : i + 1], model(rows[:, i : i + 1])) for i in range(0, 300, 7))


class Shifted(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 1e-3


class Gated(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * gate


class MayBeGated(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states) * (1 if gate is None else gate)


@pytest.mark.parametrize("kind", [Shifted, Gated, MayBeGated])
def test_what_computes_something_else_stays(kind):
    model = make(kind, 64, torch.float32)
    assert not replace_norms(model, torch.float32)
    assert isinstance(model[0], kind)


def test_other_modules_stay():
    model = nn.Sequential(
        nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.Linear(8, 8), make(LlamaRMSNorm, 8, torch.float32)
    )
    assert len(replace_norms(model, torch.float32)) == 1
    assert not replace_norms(make(LlamaRMSNorm, 8, torch.float16), torch.float16)
    assert not replace_norms(make(LlamaRMSNorm, 1, torch.float32), torch.float32), "rows of any length look alike"
    hooked = make(LlamaRMSNorm, 8, torch.float32)
    hooked[0].register_forward_hook(lambda *_: None)
    assert not replace_norms(hooked, torch.float32)


def test_without_a_compiler_they_stay_and_the_log_says_so(monkeypatch, caplog):
    def fail() -> None:
        raise KernelBuildError("no C++ compiler was found")

    monkeypatch.setattr(rms_norm, "load_kernel", fail)
    model = make(LlamaRMSNorm, 8, torch.float32)
    assert not replace_norms(model, torch.float32)
    assert isinstance(model[0], LlamaRMSNorm)
    assert "normalisations are computed by torch's operations" in caplog.text


def test_other_rows_than_the_weight_is_for_are_refused():
    model = make(LlamaRMSNorm, 8, torch.bfloat16)
    replace_norms(model, torch.bfloat16)
    for rows in (torch.ones(2, 16, dtype=torch.bfloat16), torch.ones(2, 8)):
        with pytest.raises(ValueError, match="for a weight of 8"):
            model(rows)


def test_a_model_that_needs_its_own_normalisations_keeps_them(tiny_model, make_driver, monkeypatch, caplog):
    expected = make_driver(tiny_model("llama"), num_gpu_blocks=20, chunk_size=4).generate("a", [5, 6, 7])
    assert "its normalisations stay" not in caplog.text

    def fail(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise AttributeError("variance_epsilon")

    monkeypatch.setattr(RmsNorm, "forward", fail)
    monkeypatch.setattr(rms_norm, "_replacement", lambda module, *rest: RmsNorm(module.weight, 1e-6, 0, None))
    driver = make_driver(tiny_model("llama"), num_gpu_blocks=20, chunk_size=4)
    assert "its normalisations stay as they are, its code needs them" in caplog.text
    assert driver.generate("a", [5, 6, 7]) == expected


def test_a_copy_has_a_weight_of_its_own():
    model = make(LlamaRMSNorm, 8, torch.bfloat16)
    replace_norms(model, torch.bfloat16)
    other = copy.deepcopy(model)
    other[0].weight.zero_()
    rows = torch.ones(1, 8, dtype=torch.bfloat16)
    assert model(rows).abs().sum() > 0
    assert other(rows).abs().sum() == 0
    torch.testing.assert_close(model.float()(rows.float()), make(LlamaRMSNorm, 8, torch.bfloat16).float()(rows.float()))
