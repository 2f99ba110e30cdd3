"""Decoder layers by two calls each compute what transformers' layers do, and only layers that do just that are replaced."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from engine.attention.transformers_door import ATTENTION_NAME, ShapeProbe, attention_handled_by
from engine.config import EngineConfig
from engine.errors import KernelBuildError
from engine.executor import fused_layers, model_loader, panel_kernel
from engine.executor.compiled_layers import find_layers, logits_difference
from engine.executor.fused_layers import NUM_SEEN_ROWS, FusedLayer, fuse_layers, separate
from engine.executor.layer_parts import SILU
from engine.executor.lora.layers import AdaptedRows, Change, install_layers
from engine.executor.lora.low_rank_kernel import load_kernel as load_low_rank
from engine.executor.model_check import probe_logits
from engine.executor.model_loader import load_model
from engine.executor.packed_linear import OneDnnWeight, PackedWeight, PlainWeight, pack_linears
from engine.executor.quantized_linear import Int4Weight, Int8Weight
from engine.executor.rms_norm import replace_norms
from tests.engine.executor.test_panel_kernel import DTYPES, NEEDS_KERNEL

pytestmark = NEEDS_KERNEL

DIMENSIONS = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 24}  # not what the hidden size gives
# Biases of Q, K and V, normalised queries and keys, GELU, four normalisations, none in front, heads that are turned in part
# or not at all, one product for all of Q, K and V.
FUSED = {
    "llama": {},
    "qwen2": {},
    "qwen3": HEADS,
    "mistral": {"sliding_window": 24},
    "gemma": HEADS,
    "gemma2": {**HEADS, "attn_logit_softcapping": 5.0},
    "gemma3_text": HEADS,
    "olmo2": {},
    "phi3": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0]},
    "exaone4": {},
}
# Scaled residuals, queries scaled by their position, experts, pairs that are turned otherwise, other normalisations, and
# other forms.
OTHERS = {
    "granite": ({"residual_multiplier": 0.5}, "it takes {'mul': 7"),
    "ministral3": (HEADS, "'log': 1"),
    "mixtral": ({"num_local_experts": 4}, "of the form NPAPN"),
    "helium": ({"head_dim": 16}, "'stack': 2"),
    "stablelm": ({}, "of the form ?PAP?PP"),
    "cohere": ({}, "of the form ?PAPPP"),
    "arcee": ({}, "'square': 1"),
}


@pytest.fixture(autouse=True)
def no_units_for_many_rows(monkeypatch):
    """On every machine, all steps are computed by fused layers."""
    monkeypatch.setattr(panel_kernel, "max_rows", lambda dtype: sys.maxsize)


# Of logits, relative to the largest.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


class Made(SimpleNamespace):
    """A random model of a family, packed, its normalisations replaced, with attention by a probe."""

    def __init__(
        self,
        family: str,
        options: dict[str, Any],
        dtype: torch.dtype = torch.float32,
        packing: type[PackedWeight] = OneDnnWeight,
        size: float = 0.15,
    ) -> None:
        """size: of the weights of layers that give what is added."""
        super().__init__()
        self.config = AutoConfig.for_model(family, **{**DIMENSIONS, **options})
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation="eager").eval()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(False)
            parameter.normal_(0.9 if name.endswith("norm.weight") else 0.0, size if "down_proj" in name else 0.15)
        self.model.set_attn_implementation(ATTENTION_NAME)
        pack_linears(self.model, self.logits, packing, PlainWeight)
        replace_norms(self.model, dtype)
        self.layers = find_layers(self.model, DIMENSIONS["num_hidden_layers"])

    def logits(self, num_rows: int = NUM_SEEN_ROWS) -> torch.Tensor:
        return probe_logits(self.model, self.config.get_text_config(), ShapeProbe(), num_rows)

    def fuse(self) -> int:
        return fuse_layers(self.layers, self.logits)


def in_all_dtypes(families: Iterable[str]) -> list[Any]:
    """(family, dtype) of all but OLMo2 in bfloat16, which turns its queries in float32."""
    cases = []
    for family in families:
        for each in DTYPES:
            dtype, marks = (each, ()) if isinstance(each, torch.dtype) else (each.values[0], each.marks)
            if (family, dtype) != ("olmo2", torch.bfloat16):
                cases.append(pytest.param(family, dtype, marks=marks))
    return cases


@pytest.mark.parametrize(("family", "dtype"), in_all_dtypes(FUSED), ids=str)
def test_the_logits_are_those_of_the_layers(family, dtype):
    made = Made(family, FUSED[family], dtype)
    nums_of_rows = (1, 2, 7, NUM_SEEN_ROWS, 200)
    expected = [made.logits(num_rows) for num_rows in nums_of_rows]
    assert made.fuse() == len(made.layers)
    for num_rows, logits in zip(nums_of_rows, expected, strict=True):
        error = (made.logits(num_rows) - logits).abs().max() / logits.abs().max()
        assert error <= TOLERANCE[dtype], num_rows
    separate(made.layers)
    assert not any(isinstance(layer.forward, FusedLayer) for layer in made.layers)
    assert torch.equal(made.logits(7), expected[2])


@pytest.mark.parametrize("family", OTHERS)
def test_layers_that_compute_something_else_stay(family, caplog):
    options, reason = OTHERS[family]
    made = Made(family, options)
    expected = made.logits()
    assert_stays(made, reason, caplog)
    assert torch.equal(made.logits(), expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_queries_that_are_turned_in_another_dtype_stay(dtype, caplog):
    assert_stays(Made("olmo2", {}, dtype), "'to': 2", caplog)


def assert_stays(made: Made, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """No layer is fused, because of that."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, fused_layers.__name__):
        assert made.fuse() == 0
    reasons = [record.getMessage() for record in caplog.records if record.name == fused_layers.__name__]
    assert len(reasons) == len(made.layers)
    assert all(reason in each for each in reasons), reasons


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", [Int8Weight, Int4Weight])
def test_weights_in_fewer_bits(packing, dtype):
    made = Made("qwen3", HEADS, dtype, packing)
    expected = made.logits()
    assert made.fuse() == len(made.layers)
    # Inputs are rounded to 8 bits: what differs at all may be rounded the other way.
    assert logits_difference(made.logits(), expected) <= 2e-2


def test_weights_without_a_kernel_stay(caplog):
    assert_stays(Made("llama", {}, packing=PlainWeight), "of the form NPA?NP?", caplog)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    """Nor on how many threads there are: these layers are wide enough for all parts of a step to be shared by two."""
    width = 2048
    made = Made("qwen3", {**HEADS, "hidden_size": width, "intermediate_size": width}, dtype)
    made.fuse()
    layer, most = made.layers[0], 100
    torch.manual_seed(1)
    hidden = torch.randn(1, most, width).to(dtype)
    angles = tuple(torch.randn(1, most, 24).to(dtype) for _ in range(2))
    seen: list[torch.Tensor] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: Any) -> torch.Tensor:
        seen.append(torch.cat([query, key, value]))
        return query.transpose(0, 1).clone()  # of each row alone

    def compute(rows: slice) -> list[torch.Tensor]:
        seen.clear()
        with attention_handled_by(SimpleNamespace(attend=attend)), torch.inference_mode():
            out = layer(hidden[:, rows], position_embeddings=tuple(part[:, rows] for part in angles))
        return [out[0], seen[0].transpose(0, 1)]

    torch.set_num_threads(2)
    try:
        together = compute(slice(None))
    finally:
        torch.set_num_threads(1)
    for rows in (slice(0, 1), slice(5, 6), slice(9, 16), slice(most - 3, most)):
        for alone, all_rows in zip(compute(rows), together, strict=True):
            assert torch.equal(alone, all_rows[rows])


def test_many_rows_are_left_to_units_for_them(monkeypatch):
    monkeypatch.setattr(panel_kernel, "max_rows", lambda dtype: 16)
    made = Made("llama", {})
    assert made.fuse() == len(made.layers)
    calls: list[int] = []
    for layer in made.layers:
        own = layer.forward._forward
        monkeypatch.setattr(layer.forward, "_forward", lambda *args, own=own, **kw: calls.append(1) or own(*args, **kw))
    made.logits(16)
    assert not calls
    made.logits(17)
    assert len(calls) == len(made.layers)


@pytest.mark.parametrize("is_few", [False, True])
@pytest.mark.parametrize(("family", "dtype"), in_all_dtypes(["llama", "qwen3", "gemma2", "olmo2", "phi3"]), ids=str)
def test_what_adapters_change_is_added(family, dtype, is_few):
    """To every product, in steps of any size; without adapters, nothing is."""
    made = Made(family, FUSED[family], dtype)
    adapted = install_layers(made.model, made.config, {}, None, made.logits)
    torch.manual_seed(3)
    changes = {
        name: Change(
            0.3 * torch.randn(4, shape.in_features).to(dtype), 0.3 * torch.randn(4, shape.out_features).to(dtype), 0.7
        )
        for name, shape in adapted.shapes.items()
    }
    nums_of_rows = (1, 5, 100)
    adapted.step.kernel = load_low_rank(torch.device("cpu"), dtype)

    def both(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        alone = made.logits(num_rows)
        rows = torch.arange(0, num_rows, 2) if is_few else slice(0, (num_rows + 1) // 2)
        adapted.step.parts = (AdaptedRows(changes, rows, is_few),)
        try:
            return alone, made.logits(num_rows)
        finally:
            adapted.step.parts = ()

    expected = [both(num_rows) for num_rows in nums_of_rows]
    assert made.fuse() == len(made.layers)
    for layer in made.layers:
        layer.forward._forward = None  # is not to be called
    for num_rows, theirs in zip(nums_of_rows, expected, strict=True):
        ours = both(num_rows)
        assert not torch.allclose(*theirs, rtol=0.1)
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine - other).abs().max() / other.abs().max() <= TOLERANCE[dtype], num_rows


def test_layers_of_which_adapters_change_only_a_part_stay():
    made = Made("llama", {})
    install_layers(made.model, made.config, {}, None, made.logits)
    attention = made.layers[0].self_attn
    attention.k_proj = attention.k_proj.inner
    assert made.fuse() == len(made.layers) - 1


def test_operations_that_an_input_need_not_show_are_noticed(monkeypatch, caplog):
    """Values are limited, but to more than any that the trial has."""
    monkeypatch.setattr(
        modeling_llama.LlamaMLP,
        "forward",
        lambda self, x: self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-1e6, 1e6)),
    )
    assert_stays(Made("llama", {}), "'clamp': 1", caplog)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_done_for_many_rows_only_is_noticed(dtype, monkeypatch, caplog):
    own = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: own(self, x.clamp(-1, 1) if x.shape[1] > 30 else x)
    )
    assert_stays(Made("llama", {}, dtype), "depends on how many rows", caplog)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_activation_that_is_nearly_another_one_is_noticed(dtype, caplog):
    """GELU by the error function, which differs from that by tanh by less than bfloat16 shows at once."""
    assert_stays(Made("llama", {"hidden_act": "gelu"}, dtype), "'gelu': 1", caplog)
    assert Made("llama", {"hidden_act": "gelu_pytorch_tanh"}, dtype).fuse() == DIMENSIONS["num_hidden_layers"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_that_adds_little_is_seen(dtype, monkeypatch, caplog):
    """The gate is called first, but activates the other product."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(self.up_proj(x)) * gate)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    for size in (1e-3, 0.15):
        assert_stays(Made("llama", {}, dtype, size=size), "two calls give something else", caplog)


def test_a_layer_that_cannot_be_tried_stays(monkeypatch, caplog):
    """Called with fewer rows than its model was, it raises; the model can be served all the same."""
    own = modeling_llama.LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states.view(1, NUM_SEEN_ROWS, 64)
        return own(self, hidden_states, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    assert_stays(Made("llama", {}), "RuntimeError", caplog)


def test_angles_of_other_rows_are_refused():
    made = Made("llama", {})
    made.fuse()
    hidden, angles = torch.randn(1, 3, 64), torch.randn(1, 1, 16)
    with pytest.raises(ValueError, match="for 3 rows"):
        made.layers[0](hidden, position_embeddings=(angles, angles))


def test_a_copy_of_the_model_has_its_own_weights():
    made = Made("llama", {})
    made.fuse()
    expected = made.logits(5)
    other = copy.deepcopy(made.model)
    original, made.model = made.model, other
    torch.testing.assert_close(made.logits(5), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(layer.forward, FusedLayer) for layer in find_layers(other, 2))
    assert all(layer.forward.__self__ is layer for layer in find_layers(other, 2))
    assert all(isinstance(layer.forward, FusedLayer) for layer in find_layers(original, 2))


def test_the_same_operations_on_other_numbers_are_noticed(monkeypatch, caplog):
    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((second, -first), dim=-1)

    monkeypatch.setattr(modeling_llama, "rotate_half", rotate_half)
    assert_stays(Made("llama", {}), "two calls give something else", caplog)


def test_without_a_compiler_layers_stay(monkeypatch, caplog):
    def fail() -> None:
        raise KernelBuildError("no C++ compiler")

    made = Made("llama", {})
    expected = made.logits()
    monkeypatch.setattr(fused_layers, "load_kernel", fail)
    with caplog.at_level(logging.WARNING):
        assert made.fuse() == 0
    assert "slow for decodes; no C++ compiler" in caplog.text
    assert torch.equal(made.logits(), expected)


def loaded_layers(config: EngineConfig) -> list[nn.Module]:
    return find_layers(load_model(config).model, 3)


def test_loading_a_model_fuses_its_layers(tiny_model, caplog):
    config = EngineConfig(model=str(tiny_model("llama")), device="cpu", dtype="float32")
    with caplog.at_level(logging.INFO):
        layers = loaded_layers(config)
    assert all(isinstance(layer.forward, FusedLayer) for layer in layers)
    assert "3 of 3 decoder layers by two calls each" in caplog.text
    assert not any(
        isinstance(layer.forward, FusedLayer) for layer in loaded_layers(replace(config, pack_weights=False))
    )


def test_a_model_that_gives_other_logits_is_served_with_its_own_layers(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(fused_layers, "ACTIVATIONS", {SILU: 1})
    monkeypatch.setattr(fused_layers, "_is_same", lambda *_: True)
    with caplog.at_level(logging.WARNING):
        layers = loaded_layers(EngineConfig(model=str(tiny_model("llama")), device="cpu", dtype="float32"))
    assert not any(isinstance(layer.forward, FusedLayer) for layer in layers)
    assert "its decoder layers stay as they are" in caplog.text


def test_logits_of_quantised_weights_may_differ_by_their_rounding(tiny_model, monkeypatch):
    """A sum in another order may have an input rounded the other way, which is more than float32's own rounding."""
    monkeypatch.setattr(model_loader, "logits_difference", lambda *_: 1e-2)
    config = EngineConfig(model=str(tiny_model("llama")), device="cpu", dtype="float32")
    assert not any(isinstance(layer.forward, FusedLayer) for layer in loaded_layers(config))
    layers = loaded_layers(replace(config, quantization="int8"))
    assert all(isinstance(layer.forward, FusedLayer) for layer in layers)
