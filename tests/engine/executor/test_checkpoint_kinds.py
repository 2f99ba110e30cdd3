"""Quantised checkpoints of the hub: each kind gives the weights that its specification says, and what cannot is refused."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.errors import ConfigError, ModelLoadError
from engine.executor.checkpoint.kinds import take_kind
from engine.executor.checkpoint.loading import read_quantized
from engine.executor.checkpoint.stored_weights import open_weights
from engine.executor.model_loader import LoadedModel, check_can_be_sharded, load_model
from engine.sizing import measure_model
from tests.engine.test_equivalence import assert_same_tokens
from tests.quantized_checkpoints import KINDS, to_bytes, write_files, write_quantized

CPU = torch.device("cpu")
OPTIONS = {"chunk_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 4, "max_model_len": 160}


def load(folder: Path, **options: object) -> LoadedModel:
    return load_model(EngineConfig.from_options({"model": str(folder), "dtype": "float32", **options}))


def read(folder: Path) -> Any:
    """transformers' model of a checkpoint, with its own attention."""
    hf_config = AutoConfig.from_pretrained(folder)
    kind = take_kind(str(folder), hf_config)
    assert kind is not None
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, report = read_quantized(str(folder), str(folder), hf_config, kind, CPU, options)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_computes_what_its_weights_say(kind, tiny_model, tmp_path):
    quantized, dense = write_quantized(tiny_model("llama"), tmp_path, kind)
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
    model = read(quantized)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)


def test_the_experts_of_gpt_oss(tmp_path):
    values = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    config = AutoConfig.for_model(
        "gpt_oss", num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, **values
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    stored = {}
    for name, weight in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = weight
            continue
        num_experts, num_in, num_out = weight.shape
        codes = torch.randint(16, (num_experts, num_out, num_in // 32, 32))
        exponents = torch.randint(118, 125, (num_experts, num_out, num_in // 32))
        stored |= {f"{name}_blocks": to_bytes(codes), f"{name}_scales": exponents.to(torch.uint8)}
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
        weight.copy_((table[codes] * 2.0 ** (exponents - 127)[..., None]).flatten(2).mT)
    write_files(stored, tmp_path)
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    config.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(read(tmp_path)), logits(model))


def test_it_is_the_model_of_the_dequantised_weights_to_the_last_bit(tiny_model, tmp_path, caplog):
    """Files that tear a weight's parts apart, a tied embedding, packing; the log says what it costs."""
    caplog.set_level("INFO")
    quantized, dense = write_quantized(tiny_model("llama"), tmp_path, "awq", num_files=3)
    loaded, expected = load(quantized), load(dense)
    assert loaded.fingerprint == expected.fingerprint != load(tiny_model("llama")).fingerprint
    assert loaded.num_weight_bytes == expected.num_weight_bytes
    assert "21 of its weights are quantised (awq), 0 MiB of files" in caplog.text
    size, _ = measure_model(str(quantized), dtype="float32")
    assert size.weight_bytes == loaded.num_parameters * 4
    int8 = load(quantized, quantization="int8")
    assert int8.num_weight_bytes < loaded.num_weight_bytes
    assert len({loaded.fingerprint, int8.fingerprint, load(quantized, load_format="dummy").fingerprint}) == 3


def test_experts_that_lie_one_by_one_are_joined(tiny_model, tmp_path):
    """mixtral's files have a weight of each expert, its model one of them all."""
    plain, parted = tiny_model("mixtral"), tmp_path / "parted"
    names = load_file(plain / "model.safetensors")
    is_expert = [name for name in names if ".experts." in name]
    assert is_expert
    assert all(name.endswith(".weight") for name in is_expert)
    quantized, dense = write_quantized(
        plain, parted, "gptq desc_act", is_quantized=lambda name: ".experts." in name or name.endswith("_proj.weight")
    )
    assert load(quantized).fingerprint == load(dense).fingerprint


@pytest.mark.parametrize(("num_ranks", "num_conversations", "num_turns"), [(1, 5, 3), (2, 2, 2)])
def test_conversations_equal_stateless(num_ranks, num_conversations, num_turns, tiny_model, tmp_path, make_driver):
    quantized, dense = write_quantized(tiny_model("llama"), tmp_path, "gptq desc_act")
    kept = make_driver(quantized, num_gpu_blocks=24, num_cpu_blocks=20, tensor_parallel_size=num_ranks, **OPTIONS)
    fresh = make_driver(dense, num_gpu_blocks=200, mode="stateless", **OPTIONS)
    rng = random.Random(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=7, logprobs=2, ignore_eos=True)
    histories = {f"c{number}": rng.choices(range(3, 250), k=11) for number in range(num_conversations)}
    for turn in range(num_turns):
        for conversation, history in histories.items():
            history += rng.choices(range(3, 250), k=rng.randint(2, 20))
            for driver in (kept, fresh):
                driver.add(f"{conversation}.{turn}", history, conversation, sampling)
        for driver in (kept, fresh):
            driver.run()
            driver.core.check_integrity()
        for conversation, history in histories.items():
            assert_same_tokens(kept, fresh, f"{conversation}.{turn}")
            history += fresh.tokens(f"{conversation}.{turn}")
    assert sum(kept.cached.values()) > 0


def test_a_rank_keeps_no_more_than_its_part(tiny_model, tmp_path):
    quantized, dense = write_quantized(tiny_model("llama"), tmp_path, "awq")
    kind = take_kind("model", AutoConfig.from_pretrained(quantized))
    name = "model.layers.1.mlp.down_proj.weight"
    expected = load_file(dense / "model.safetensors")[name]
    with open_weights(str(quantized), kind.formats, CPU, torch.float32) as weights:
        assert weights[name].get_shape() == [64, 96]
        for part in ((slice(32, 64), slice(None)), (slice(None), slice(0, 48))):
            taken = weights[name][part]
            assert torch.equal(taken, expected[part])
            assert taken.untyped_storage().nbytes() == expected.nbytes / 2


def test_a_text_model_inside_of_another_model_says_how_it_is_quantised():
    inner = SimpleNamespace(quantization_config=KINDS["awq"][0])
    outer = SimpleNamespace(get_text_config=lambda: inner)
    assert take_kind("model", outer).method == "awq"
    assert not hasattr(inner, "quantization_config")
    assert take_kind("model", outer) is None


REFUSED = {
    "an unknown method": ({"quant_method": "magic"}, "not known here; what can be loaded is awq, bitsandbytes"),
    "no method": ({"bits": 4}, "quantised with None"),
    "auto-round": ({"quant_method": "auto-round"}, "auto_gptq"),
    "hqq": ({"quant_method": "hqq"}, "nothing here reads it"),
    "3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "bits is 3, but only 2 or 4 or 8"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "'marlin'"),
    "no group size": ({"quant_method": "gptq", "bits": 4}, "group_size is None"),
    "gemv": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMV"}, "version is 'gemv'"),
    "a transform": ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "transform_config"),
    "sparsity": ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}, "'sparse-24'"),
    "marlin-24": ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "'marlin-24'"),
    "a damaged block": ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"blocks are \[0, 128\]"),
    "an infinite block": ({"quant_method": "fp8", "weight_block_size": [math.inf, 128]}, r"blocks are \[inf, 128\]"),
    "int4 of torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
        "quant_type is 'Int4WeightOnlyConfig'",
    ),
    "MXFP8 of modelopt": ({"quant_method": "modelopt", "quant_algo": "MIXED"}, "quant_algo is 'MIXED'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_before_its_files(case, tiny_model, tmp_path):
    options, message = REFUSED[case]
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": options}))
    engine_config = EngineConfig(model=str(tmp_path), tensor_parallel_size=2)
    for attempt in (
        lambda: load(tmp_path),
        lambda: check_can_be_sharded(engine_config),
        lambda: measure_model(str(tmp_path)),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            attempt()
        assert error.value.param == "model"
        assert "Take the checkpoint that it was made from" in error.value.message


@pytest.mark.parametrize("odd", [["x"], "abc", 5])
def test_what_should_say_how_it_is_quantised_and_is_no_mapping(odd, tiny_model, tmp_path):
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": odd}))
    for attempt in (lambda: load(tmp_path), lambda: measure_model(str(tmp_path))):
        with pytest.raises(ModelLoadError):
            attempt()


def test_one_file_of_weights_is_read_rather_than_an_index_beside_it(tiny_model, tmp_path):
    quantized, _ = write_quantized(tiny_model("llama"), tmp_path, "awq")
    index = quantized / "model.safetensors.index.json"
    index.write_text("{}")
    load(quantized)
    (quantized / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"index.json of .* is damaged"):
        load(quantized)


STATE = "weight.quant_state.bitsandbytes__nf4"


def state(**change: Any) -> torch.Tensor:
    """Of q_proj, as bitsandbytes writes it."""
    values = {"blocksize": 64, "shape": [64, 64], "nested_blocksize": 32, "nested_offset": 0.2} | change
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Tensors of the first layer's q_proj; None = without it."""
    tensors = load_file(folder / "model.safetensors")
    for part, content in change.items():
        name = f"model.layers.0.self_attn.q_proj.{part}"
        tensors.pop(name, None)
        if content is not None:
            tensors[name] = content
    write_files(tensors, folder)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq", {"scales": None}, "q_proj.qweight but no model.layers.0.self_attn.q_proj.scales"),
        ("gptq", {"scales": torch.ones(3, 64)}, "its scales and zero points do not fit"),
        ("gptq", {"g_idx": torch.zeros(40, dtype=torch.int32)}, "8 words for 40 numbers: only 2, 4 or 8 bits"),
        ("gptq", {"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "in no group, of 2"),
        ("gptq", {"weight": torch.ones(64, 64)}, "q_proj.weight twice"),
        ("bitsandbytes nf4", {"weight.quant_map": torch.ones(15)}, "has not 16 places"),
        (
            "bitsandbytes nf4",
            {"weight.nested_quant_map": None},
            "no places in a table of 256",
        ),
        (
            "bitsandbytes nf4",
            {"weight": torch.zeros(4096, 1, dtype=torch.uint8)},
            "4096 bytes for 4096 numbers of 4 bits",
        ),
        ("bitsandbytes nf4", {STATE: state(blocksize=1 << 28)}, "do not fit 4096 numbers in blocks of 268435456"),
        ("bitsandbytes nf4", {STATE: state(nested_blocksize=1 << 28)}, "scales of scales do not fit"),
        ("bitsandbytes nf4", {STATE: state(shape=None)}, "of model.layers.0.self_attn.q_proj.weight, "),
        ("gptq", {"qweight": torch.zeros(8, 64, dtype=torch.int64)}, "not of 32 bits"),
        ("fp8 blocks", {"weight_scale_inv": torch.ones(2, 2, 2)}, r"scales of shape \[2, 2, 2\] do not fit"),
        ("awq", {"qzeros": torch.zeros(2, 9, dtype=torch.int32)}, "4-bit ones of AWQ"),
        ("awq", {"qweight": None}, "q_proj.qzeros in I32, and nothing beside it"),
        (
            "compressed int4",
            {"weight_scale": torch.ones(64, 4)},
            r"scales of shape \[64, 4\] do not fit a weight of \[64, 64\]",
        ),
        ("compressed int4", {"weight_shape": torch.tensor([64, 99])}, "2, 4 or 8 bits"),
        ("compressed int8", {"weight": torch.ones(64, 64)}, "has a scale, but its numbers are F32"),
        ("fp8 blocks", {"weight_scale_inv": None}, "q_proj.weight in F8_E4M3, and nothing beside it"),
        ("fp8 blocks", {"weight_bits": torch.ones(1, dtype=torch.int8)}, "weight_bits in I8"),
        ("torchao", {"_weight_act_pre_scale": torch.ones(64)}, "1 parts of quantised weights"),
    ],
)
def test_damaged_files_are_refused(kind, change, message, tiny_model, tmp_path):
    quantized, _ = write_quantized(tiny_model("llama"), tmp_path, kind)
    rewrite(quantized, change)
    with pytest.raises(ModelLoadError, match=message):
        load(quantized)


def test_bytes_may_be_stored_as_numbers_of_another_kind(tiny_model, tmp_path):
    """As bnb_4bit_quant_storage has it."""
    quantized, dense = write_quantized(tiny_model("llama"), tmp_path, "bitsandbytes nf4")
    tensors = load_file(quantized / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(quantized, {"weight": tensors[name].flatten().view(torch.bfloat16)[:, None].clone()})
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(read(quantized)), logits(expected), atol=1e-5, rtol=1e-5)


def test_a_quantised_checkpoint_whose_configuration_does_not_say_so(tiny_model, tmp_path):
    quantized, _ = write_quantized(tiny_model("llama"), tmp_path, "fp8 blocks")
    shutil.copy(tiny_model("llama") / "config.json", quantized)
    with pytest.raises(ModelLoadError, match=r"21 parts of quantised weights .* such as .*weight_scale_inv"):
        load(quantized)


def test_transposed_layers_and_other_files_are_refused(tiny_model, tmp_path):
    quantized, _ = write_quantized(tiny_model("llama"), tmp_path, "awq")
    (quantized / "model.safetensors").rename(quantized / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"without model.safetensors"):
        load(quantized)
    folder = Path(shutil.copytree(tiny_model("gpt2"), tmp_path / "gpt2"))
    config = json.loads((folder / "config.json").read_text())
    options = KINDS["gptq"][0]
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": options}))
    with pytest.raises(ConfigError, match=r"\(gpt2\) is quantised \(gptq\), and its family keeps weights transposed"):
        load(folder)
