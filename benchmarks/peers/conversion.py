"""Converts a checkpoint for the systems that do not read the Hugging Face format, with their own tools.

Runs as a part of peer_comparison.py; needs what setup.sh leaves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

# What `--weights` means to each.
WEIGHTS = ("same", "int8", "int4")
GGUF_DTYPES = {"float32": "f32", "bfloat16": "bf16"}
GGUF_QUANTIZED = {"int8": "Q8_0", "int4": "Q4_K_M"}
# Features that share a scale and a zero: 128 is the exporter's own choice, which has to divide the model's sizes.
INT4_GROUP_SIZES = (128, 64, 32)


def convert_to_openvino(model: Path, folder: Path, weights: str, venvs: Path) -> None:
    """weights: `same` keeps them in fp32 containers, since the precision is chosen when the model is loaded."""
    command: list[str | Path] = [venvs / "convert/bin/optimum-cli", "export", "openvino", "--model", model]
    command += ["--task", "text-generation-with-past", "--weight-format", "fp32" if weights == "same" else weights]
    if weights == "int4":
        config = json.loads((model / "config.json").read_text())
        sizes = (config["hidden_size"], config["intermediate_size"])
        group_size = next(size for size in INT4_GROUP_SIZES if not any(features % size for features in sizes))
        command += ["--group-size", str(group_size)]
    subprocess.run([*command, folder], check=True, env=_offline())


def convert_to_gguf(model: Path, folder: Path, dtype: str, weights: str, venvs: Path) -> None:
    """With llama.cpp's own script, and its own program for quantised weights.

    The script knows tokenizers by a hash of how they split a text, and not the random model's: it is told gpt-2's way,
    which is byte-level too. (No text is tokenised in this comparison.) Config and tokenizer are put beside it.
    """
    source = venvs / "llama_cpp/vendor/llama.cpp"
    script = source / "convert_hf_to_gguf_byte_level.py"
    original = (source / "convert_hf_to_gguf.py").read_text()
    # The function lives in a class of the package beside the script: replaced there, before the script's own main().
    patch = "from conversion.base import TextModel\nTextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
    script.write_text(re.sub(r"(?m)^if __name__ == .__main__.:", patch + r"\g<0>", original))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(model / name, folder)
    made = folder / "model.gguf"
    command: list[str | Path] = [venvs / "convert/bin/python", script, model, "--outtype", GGUF_DTYPES[dtype]]
    if weights == "same":
        subprocess.run([*command, "--outfile", made], check=True, env=_offline())
        return
    unquantised = folder / "unquantised.gguf"
    subprocess.run([*command, "--outfile", unquantised], check=True, env=_offline())
    quantize = venvs / "llama_cpp/build/bin/llama-quantize"
    subprocess.run([quantize, unquantised, made, GGUF_QUANTIZED[weights]], check=True)
    unquantised.unlink()


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}
