"""Which models load: those that are right, in every dtype and whatever their ids are.

One whose attention the paged cache does not know is rejected, in every dtype.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.attention import reference
from engine.attention import transformers_door as interface
from engine.config import EngineConfig
from engine.embedded_model import embedded_model_path
from engine.errors import UnsupportedModelError
from engine.executor.compiled_layers import logits_difference
from engine.executor.model_loader import PROBE_TOLERANCE, load_model
from tests.conftest import FAMILIES, save_tiny_model

DTYPES = ["float32", "bfloat16", "float16"]
SERVED = [family for family in FAMILIES if family not in ("bloom", "gptj")]
# Heads of 16 features; sinks; a window in every other layer.
GPT_OSS = {
    **FAMILIES["qwen3"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss")
    config = AutoConfig.for_model("gpt_oss", **GPT_OSS, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or name.endswith("sinks"):
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder_of(tiny_model, gpt_oss):
    def get(family: str) -> Path:
        return gpt_oss if family == "gpt_oss" else embedded_model_path() if family == "embedded" else tiny_model(family)

    return get


def modelling(family: str):
    """The module that computes a family, imported here: no other test need have loaded such a model before."""
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def load(folder: Path, dtype: str, **options: object):
    return load_model(EngineConfig(model=str(folder), dtype=dtype, num_threads=1, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["embedded", *SERVED, "gpt_oss"])
def test_every_family_is_loaded_in_every_dtype(family, dtype, folder_of, caplog):
    loaded = load(folder_of(family), dtype)
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert "not served with packed weights" not in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["zero", "alike", "huge"])
def test_ids_that_a_model_was_never_trained_on_decide_nothing(kind, dtype, tmp_path):
    """Nor do special ones: here all that the probe could take are, and transformers' own attentions differ on them."""
    folder = save_tiny_model("llama", tmp_path, num_hidden_layers=8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight[3:280]
        rows.copy_(
            {"zero": torch.zeros_like(rows), "alike": rows[:1].expand_as(rows).clone(), "huge": 300 * rows}[kind]
        )
    model.save_pretrained(folder)
    for pack_weights in (False, True):
        assert load(folder, dtype, pack_weights=pack_weights).layers


@pytest.mark.parametrize(("dtype", "sharpness"), [("bfloat16", 10), ("float16", 20)])
@torch.inference_mode()
def test_a_model_that_makes_much_of_rounding_is_loaded(dtype, sharpness, tmp_path):
    """As SmolLM2 on its special tokens: transformers' own attentions differ there by more than any fixed tolerance."""
    folder = save_tiny_model("llama", tmp_path, num_hidden_layers=12)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(sharpness)
    model.save_pretrained(folder)
    model = model.to(getattr(torch, dtype)).eval()
    logits = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits.append(model(input_ids=torch.arange(30, 230, 10)[None], use_cache=False).logits)
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert difference > 2 * PROBE_TOLERANCE[model.dtype], "this model shows nothing"
    for pack_weights in (False, True):
        assert load(folder, dtype, pack_weights=pack_weights).layers


# What is read of a call, wrong: (family, change of AttentionParams' values).
MISREAD = {
    "scaling": ("llama", {"scaling": lambda x: 1.05 * x}),
    "no window": ("mistral", {"sliding_window": lambda _: None}),
    "window + 1": ("mistral", {"sliding_window": lambda x: x + 1}),
    "window - 1": ("gemma2", {"sliding_window": lambda x: x and x - 1}),
    "no softcap": ("gemma2", {"softcap": lambda _: None}),
    "softcap": ("gemma2", {"softcap": lambda x: x and 1.1 * x}),
    "no sinks": ("gpt_oss", {"sinks": lambda _: None}),
    "sinks": ("gpt_oss", {"sinks": lambda x: x + 0.1}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", list(MISREAD))
def test_a_call_that_is_misread_is_seen(what, dtype, folder_of, monkeypatch):
    family, changes = MISREAD[what]
    attend = interface._attend

    def wrong(query, key, value, scaling, sliding_window, softcap, sinks):
        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "sinks": sinks}
        given |= {name: change(given[name]) for name, change in changes.items()}
        return attend(query, key, value, **given)

    monkeypatch.setattr(interface, "_attend", wrong)
    with pytest.raises(UnsupportedModelError, match="attention call"):
        load(folder_of(family), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_that_looks_ahead_is_seen(dtype, folder_of, monkeypatch):
    attend_dense = reference.attend_dense

    def wrong(q, k, v, params):
        return torch.cat([attend_dense(q[:, i : i + 1], k, v, params) for i in range(q.shape[1])], dim=1)

    monkeypatch.setattr(reference, "attend_dense", wrong)
    with pytest.raises(UnsupportedModelError, match="the outputs differ"):
        load(folder_of("llama"), dtype)


def no_window(config, **options):
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(config, **options)


def looks_ahead(config, **options):
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(config, **options, or_mask_function=lambda b, h, q, k: k <= q + 1)


def twice_the_window(config, **options):
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(config, **options, and_mask_function=lambda b, h, q, k: k > q - 48)


MASKS = {
    "no window": ("mistral", "create_sliding_window_causal_mask", no_window),
    "ahead": ("llama", "create_causal_mask", looks_ahead),
    "another window": ("llama", "create_causal_mask", twice_the_window),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", list(MASKS))
def test_a_mask_that_the_interface_is_not_told_of_is_seen(what, dtype, folder_of, monkeypatch):
    """Even where it shows behind the tokens of the probe alone."""
    family, name, function = MASKS[what]
    monkeypatch.setattr(modelling(family), name, function)
    with pytest.raises(UnsupportedModelError, match=r"the mask does not show|the outputs differ"):
        load(folder_of(family), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_family_that_adds_to_the_scores_is_seen(dtype, folder_of, monkeypatch):
    """As one with a bias by distance does."""
    module = modelling("llama")
    own = module.eager_attention_forward

    def with_bias(module, query, key, value, attention_mask, **options):
        distance = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
        return own(module, query, key, value, attention_mask + 0.05 * distance.to(attention_mask.dtype), **options)

    monkeypatch.setattr(module, "eager_attention_forward", with_bias)
    with pytest.raises(UnsupportedModelError, match="the outputs differ"):
        load(folder_of("llama"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_family_that_computes_otherwise_under_another_attention_is_seen(dtype, folder_of, monkeypatch):
    """What no single call shows: the logits do."""
    attention = modelling("llama").LlamaAttention
    forward = attention.forward

    def otherwise(self, *args, **options):
        out, weights = forward(self, *args, **options)
        return (out if self.config._attn_implementation == "eager" else 2 * out), weights

    monkeypatch.setattr(attention, "forward", otherwise)
    with pytest.raises(UnsupportedModelError, match="gives other logits"):
        load(folder_of("llama"), dtype)


def test_a_window_in_the_mask_alone_does_not_matter_to_contexts_within_it(tmp_path):
    options = {**FAMILIES["mixtral"], "eos_token_id": None, "bos_token_id": None, "sliding_window": 32}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **options)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no sliding window"):
        load(tmp_path, "float32")
    with pytest.raises(UnsupportedModelError, match="no sliding window"):
        load(tmp_path, "float32", max_model_len=33)
    assert load(tmp_path, "float32", max_model_len=32).layers


def test_a_dtype_in_which_a_model_computes_nothing_is_named(tmp_path):
    folder = save_tiny_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e6)
    model.save_pretrained(folder)
    assert load(folder, "float32").layers
    with pytest.raises(UnsupportedModelError, match="use dtype 'bfloat16' or 'float32'") as error:
        load(folder, "float16")
    assert error.value.param == "dtype"


def test_single_rows_do_not_decide():
    expected = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    assert logits_difference(expected, expected) == 0
    flipped = expected.clone()
    flipped[[1, 5, 6]] *= -1
    assert logits_difference(flipped, expected) == 0
    assert logits_difference(expected * 1.1, expected) > 0.03
    assert logits_difference(torch.zeros(3, 5), torch.zeros(3, 5)) == 0
    assert not logits_difference(expected * float("nan"), expected) <= 1
    expected[2] = float("inf")
    assert logits_difference(expected, expected) == 0
