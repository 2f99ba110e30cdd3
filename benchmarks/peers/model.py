"""The model of the comparison, made without a download.

A random Llama of 102M parameters with a byte-level tokenizer, and its conversions for the systems that do not read
the Hugging Face format. What matters are shapes and equal weights.

    python benchmarks/peers/model.py FOLDER [--dtype float32]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

VOCAB_SIZE = 2048
MAX_CONTEXT_LEN = 4096
GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16"}


def save_model(folder: Path, dtype: str) -> None:
    """A seeded random Llama in `dtype`, as safetensors with config and tokenizer."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=MAX_CONTEXT_LEN,
        tie_word_embeddings=False,
        initializer_range=0.04,  # with the default of 0.02 attention hardly matters, and a wrong cache would not show
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Some tokens never win. Special ones: some systems forbid the end of a text where others only do not stop at it. Bytes
    # that are no character by themselves: llama.cpp's server does not stream them.
    never = [i for token, i in tokenizer.get_vocab().items() if i < 2 or not token.isascii()]
    with torch.no_grad():
        model.lm_head.weight[never] = 0
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer():
    """Byte-level, with one merge, since llama.cpp refuses none.

    Tokens that no text contains fill the vocabulary: the model may generate any id.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    tokens = [*known, *(f"token{i}" for i in range(len(known), VOCAB_SIZE))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def convert_to_openvino(model: Path, folder: Path, venvs: Path) -> None:
    """The weights as they are, in fp32 containers: the precision is chosen when the model is loaded."""
    subprocess.run(
        [
            *(venvs / "convert/bin/optimum-cli", "export", "openvino", "--model", model),
            *("--task", "text-generation-with-past", "--weight-format", "fp32", folder),
        ],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def convert_to_gguf(model: Path, folder: Path, dtype: str, venvs: Path) -> None:
    """With llama.cpp's own script.

    It knows tokenizers by a hash of how they split a text, and ours not: it is told gpt-2's way, which is byte-level
    too. (No text is tokenised in this comparison.) The config is put beside it.
    """
    source = venvs / "llama_cpp/vendor/llama.cpp"
    script = source / "convert_hf_to_gguf_byte_level.py"
    original = (source / "convert_hf_to_gguf.py").read_text()
    # The function lives in a class of the package beside the script: replaced there, before the script's own main().
    patch = "from conversion.base import TextModel\nTextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
    script.write_text(re.sub(r"(?m)^if __name__ == .__main__.:", patch + r"\g<0>", original))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "config.json", folder)
    subprocess.run(
        [
            venvs / "convert/bin/python",
            script,
            model,
            "--outfile",
            folder / "model.gguf",
            "--outtype",
            GGUF_TYPES[dtype],
        ],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=sorted(GGUF_TYPES), default="float32")
    arguments = parser.parse_args()
    save_model(arguments.folder, arguments.dtype)


if __name__ == "__main__":
    main()
