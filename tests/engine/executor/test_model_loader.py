"""What is loaded, what is refused, and what the refusal says."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import EngineConfig
from engine.embedded_model import EMBEDDED_MODEL_NAME, embedded_model_path
from engine.errors import ConfigError, ModelLoadError, UnsupportedModelError
from engine.executor.model_loader import choose_device, load_model
from engine.executor.packed_linear import choose_packing
from engine.model_files import default_model_name, model_location

MIB = 1 << 20
TINY = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def load(folder: Path | str, **options: object):
    return load_model(EngineConfig.from_options({"model": str(folder), "dtype": "float32", **options}))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def llama(tiny_model, tmp_path) -> Path:
    """A copy of the tiny Llama, to break."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "llama"))


def make_model(family: str, folder: Path, **options: object) -> Path:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **options})).save_pretrained(folder)
    return folder


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_families_without_replaceable_attention_are_refused(tiny_model, family):
    with pytest.raises(UnsupportedModelError, match=family):
        load(tiny_model(family))


@pytest.mark.parametrize("layer_type", ["chunked_attention", "linear_attention"])
def test_layers_that_cannot_be_paged_are_refused_before_any_weight_is_read(tmp_path, layer_type):
    config = AutoConfig.for_model("llama", **TINY)
    config.layer_types = ["full_attention", layer_type, "full_attention"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=layer_type):
        load(tmp_path)


def test_encoder_decoder_models_are_refused(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load(tmp_path)


def test_a_window_that_is_in_the_mask_alone_is_refused(tmp_path):
    """Paged attention has no mask; the family is right only up to the window, which the probe at load does not reach."""
    options = {"num_local_experts": 4, "max_position_embeddings": 512}
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        load(make_model("phimoe", tmp_path / "window", sliding_window=32, **options))
    assert load(make_model("phimoe", tmp_path / "none", sliding_window=None, **options)).layers


def test_windows_that_the_interface_is_told_of_are_served(tiny_model):
    for family in ("mistral", "gemma2"):
        assert len(load(tiny_model(family)).layers) == 3


def test_a_rotary_embedding_that_depends_on_the_neighbours_is_refused_where_it_would(tmp_path):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    }
    folder = make_model("llama", tmp_path, rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="max_model_len 64 at most"):
        load(folder)
    with pytest.raises(UnsupportedModelError, match="longrope"):
        load(folder, max_model_len=65)
    assert load(folder, max_model_len=64).layers


# -- what cannot be loaded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody-has-this/model-at-all", "/no/such/folder", "no such id!!"])
def test_an_absent_model_says_what_to_do(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="download the model elsewhere and give its folder") as error:
        load(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.param == "model"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "never heard of"}'),
        ("model.safetensors", b"no weights at all"),
        ("model.safetensors", None),
    ],
)
def test_a_broken_folder_is_told_by_name(llama, name, content):
    (llama / name).unlink() if content is None else (llama / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"cannot load a model from|cannot be read as JSON") as error:
        load(llama)
    assert str(llama) in str(error.value)


def test_a_download_cut_short_is_refused(llama):
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match="cannot load a model from"):
        load(llama)


@pytest.mark.filterwarnings("ignore")
def test_weights_of_another_shape_are_refused(llama):
    change_config(llama, intermediate_size=80)
    with pytest.raises(ModelLoadError, match="cannot load a model from"):
        load(llama)


def test_layers_without_weights_are_refused_and_not_made_up(llama):
    change_config(llama, num_hidden_layers=4)
    with pytest.raises(ModelLoadError, match=r"lack 9 weights of a llama model, such as model\.layers\.3"):
        load(llama)


def test_tied_weights_are_no_missing_ones(tmp_path):
    assert load(make_model("llama", tmp_path, tie_word_embeddings=True)).vocab_size == 288


# -- what is loaded ----------------------------------------------------------------------------------------------------


def test_the_embedded_model_is_described_as_it_is():
    loaded = load("embedded")
    assert (loaded.device.type, loaded.dtype, loaded.max_model_len) == ("cpu", torch.float32, 4096)
    config = json.loads((embedded_model_path() / "config.json").read_text())
    assert len(loaded.layers) == config["num_hidden_layers"]
    assert loaded.vocab_size == config["vocab_size"]
    assert {(shape.num_kv_heads, shape.k_dim, shape.v_dim) for shape in loaded.layers} == {
        (config["num_key_value_heads"], config["head_dim"], config["head_dim"])
    }
    assert loaded.num_attention_heads == config["num_attention_heads"]
    assert loaded.eos_token_ids != ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_option_decides(tiny_model, dtype):
    loaded = load(tiny_model("llama"), dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {loaded.dtype}


def test_on_a_cpu_the_default_is_float32_whatever_the_checkpoint(tmp_path):
    folder = make_model("llama", tmp_path, dtype="bfloat16")
    change_config(folder, dtype="bfloat16")
    assert load(folder, device="cpu").dtype == torch.float32


@pytest.mark.parametrize(("generation", "expected"), [({"eos_token_id": [5, 6]}, {5, 6}), ({"eos_token_id": 0}, {0})])
def test_end_of_sequence_ids_come_from_the_generation_config(llama, generation, expected):
    (llama / "generation_config.json").write_text(json.dumps(generation))
    assert set(load(llama).eos_token_ids) == expected


def test_without_a_generation_config_the_models_config_names_the_end(llama):
    (llama / "generation_config.json").unlink()
    change_config(llama, eos_token_id=7)
    assert load(llama).eos_token_ids == (7,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_where_there_is_none_is_an_error_of_the_configuration(device):
    with pytest.raises(ConfigError, match="torch sees 0 CUDA devices") as error:
        load("embedded", device=device)
    assert error.value.param == "device"
    assert choose_device("auto") == torch.device("cpu")


def test_names_follow_from_the_option(tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.model_files._hub_problem", lambda endpoint: None)
    assert default_model_name("embedded") == EMBEDDED_MODEL_NAME
    assert default_model_name("my-model") == default_model_name(str(tmp_path / "my-model")) == "my-model"
    assert default_model_name("meta-llama/Llama-3.2-1B") == model_location("meta-llama/Llama-3.2-1B")
    assert model_location("embedded") == str(embedded_model_path())


PEAK_MEMORY = """
import resource, sys
from engine.config import EngineConfig
from engine.executor.model_loader import load_model
loaded = load_model(EngineConfig(model=sys.argv[1], dtype="float32", num_threads=1))
weights = 4 * loaded.num_parameters
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, weights)
"""


def peak_memory(folder: Path) -> tuple[int, int]:
    """Peak resident bytes of a process that loads the model, and bytes of its weights."""
    process = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(folder)], capture_output=True, text=True, check=True
    )
    peak, weights = process.stdout.split()
    return int(peak), int(weights)


@pytest.mark.skipif(choose_packing(torch.float32, torch.device("cpu")) is None, reason="this torch packs nothing")
@pytest.mark.parametrize("is_packed", [True, False])
def test_the_files_of_packed_weights_are_not_kept_in_memory(is_packed, llama):
    loaded = load(llama, pack_weights=is_packed)
    gc.collect()
    assert (str(llama) in Path("/proc/self/maps").read_text()) != is_packed
    assert loaded.num_parameters


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_peak_memory_stays_near_the_size_of_the_weights(tiny_model, tmp_path):
    """Not twice, as when a model is initialised first and its weights read beside it, or packed beside the unpacked ones."""
    options = {"vocab_size": 8000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4}
    big = make_model("llama", tmp_path, **options, num_attention_heads=8, num_key_value_heads=8)
    baseline, _ = peak_memory(tiny_model("llama"))
    peak, weights = peak_memory(big)
    assert weights > 150 * MIB
    assert peak - baseline < 1.3 * weights
