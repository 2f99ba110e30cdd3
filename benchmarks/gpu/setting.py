"""What is measured: the models' shapes and all sizes, for a GPU or, tiny, for a smoke run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from model import build_tokenizer

CHUNK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by its config's class and values."""

    family: str
    values: dict[str, Any]

    @property
    def num_heads(self) -> int:
        return int(self.values["num_attention_heads"])

    @property
    def num_kv_heads(self) -> int:
        return int(self.values.get("num_key_value_heads", self.num_heads))

    @property
    def head_dim(self) -> int:
        return int(self.values["hidden_size"]) // self.num_heads

    @property
    def num_layers(self) -> int:
        return int(self.values["num_hidden_layers"])

    def save(self, folder: Path) -> str:
        """Save config and tokenizer, but no weights.

        The engine makes random ones on the device (load_format: dummy).
        """
        config = transformers.AutoConfig.for_model(self.family, **self.values)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, None if name != "pad_token_id" else 0)
        config.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return str(folder)


LLAMA_8B = Shape(
    "llama",
    {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 16384,
    },
)
OPT_13B = Shape(
    "opt",
    {
        "vocab_size": 50272,
        "hidden_size": 5120,
        "ffn_dim": 20480,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 16384,
        "word_embed_proj_dim": 5120,
    },
)
# More tokens than the tokenizer has, as in the large ones.
_TINY = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
TINY_LLAMA = Shape("llama", {**_TINY, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2})
TINY_OPT = Shape("opt", {**_TINY, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64})


@dataclass(frozen=True, slots=True)
class Setting:
    """All sizes.

    attention: (requests, new tokens of each, tokens attended to); first_call_lens: of prompts. read_bytes: that a reduction
        reads. tiles_decode, tiles_prompt: as attention, of the sweep. figure_12: past tokens.
    decode_keys, decode_warps, ...: what the sweep of tiles tries. prompt_tiles: (rows, keys, warps).
    compared_steps: decode steps by graphs that are computed again without. transfers: tokens that are swapped in, new tokens
        computed meanwhile. prompt_lens: new tokens of steps that are run by graphs and without.
    step_sizes: of the steps that are compared with the simulator; each is groups like those of attention.
    steps_window: in tokens, their longest context. steps_repeats: of what the simulator's table is made of.
    history_len: tokens of a conversation before the turns that count. active: turns at once in two tiers. active_others: the
        same in one and none, where a first token takes as long with fewer. active_peer: in transformers.
    """

    is_smoke: bool
    device: torch.device
    dtype: torch.dtype
    models: dict[str, Shape]
    repeats: int
    copy_bytes: int
    read_bytes: int
    matrix_size: int
    attention: tuple[tuple[int, int, int], ...]
    first_call_lens: tuple[int, ...]
    tiles_decode: tuple[tuple[int, int, int], ...]
    tiles_prompt: tuple[tuple[int, int, int], ...]
    decode_keys: tuple[int, ...]
    decode_warps: tuple[int, ...]
    decode_programs: tuple[int, ...]
    prompt_programs: tuple[int, ...]
    prompt_tiles: tuple[tuple[int, int, int], ...]
    stages: tuple[int, ...]
    figure_12: tuple[int, ...]
    figure_12_batch: int
    figure_12_new: int
    decode_batches: tuple[int, ...]
    decode_context: int
    decode_steps: int
    compared_steps: int
    prefill_len: int
    overhead_batch: int
    overhead_steps: int
    num_swapped_blocks: int
    transfers: tuple[tuple[int, int], ...]
    prompt_lens: tuple[int, ...]
    step_sizes: tuple[tuple[tuple[int, int, int], ...], ...]
    steps_window: int
    steps_repeats: int
    accuracy_layers: int
    accuracy_len: int
    num_sessions: int
    history_len: int
    num_turns: int
    prompt_len: int
    output_len: int
    active: tuple[int, ...]
    active_others: tuple[int, ...]
    active_peer: tuple[int, ...]
    max_num_batched_tokens: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def max_context_len(self) -> int:
        """Tokens of a conversation at its end."""
        return self.history_len + self.output_len + self.num_turns * (self.prompt_len + self.output_len)

    @property
    def working_set(self) -> int:
        """Tokens of all conversations at their ends."""
        return self.num_sessions * self.max_context_len


def for_gpu() -> Setting:
    return Setting(
        is_smoke=False,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        models={"Llama-3.1-8B": LLAMA_8B, "OPT-13B": OPT_13B},
        repeats=7,
        copy_bytes=1 << 30,
        read_bytes=2 << 30,
        matrix_size=8192,
        attention=(
            *((batch, 1, context) for batch in (1, 16, 64) for context in (2048, 8192)),
            (1, 8192, 8192),
            (4, 2048, 2048),
            (1, 512, 8192),
            (8, 64, 4096),
        ),
        first_call_lens=(1001, 1013, 1031, 2003),
        tiles_decode=((1, 1, 2048), (16, 1, 2048), (64, 1, 2048)),
        tiles_prompt=((1, 8192, 8192), (1, 512, 8192), (8, 64, 4096)),
        decode_keys=(32, 64, 128),
        decode_warps=(2, 4, 8),
        decode_programs=(2, 4, 8),
        prompt_programs=(1, 2),
        prompt_tiles=((64, 64, 4), (128, 64, 8), (128, 128, 8)),
        stages=(3, 4),
        figure_12=(256, 512, 1024, 2048),
        figure_12_batch=32,
        figure_12_new=8,
        decode_batches=(1, 8, 16, 32, 64),
        decode_context=2048,
        decode_steps=12,
        compared_steps=3,
        prefill_len=8192,
        overhead_batch=64,
        overhead_steps=64,
        num_swapped_blocks=96,
        transfers=((1024, 64), (2048, 64), (2048, 512), (2048, 2048)),
        prompt_lens=(16, 64, 128, 256, 512, 1024),
        step_sizes=(
            *(((batch, 1, context),) for batch, context in ((1, 512), (1, 8192), (8, 1024), (8, 4096))),
            *(((batch, 1, context),) for batch, context in ((32, 256), (32, 1024), (64, 512))),
            *(((1, new, new),) for new in (128, 512, 2048, 8192)),
            *(((4, new, new),) for new in (512, 2048)),
            *(((1, new, context),) for new, context in ((64, 4096), (512, 4096), (2048, 8192), (512, 16384))),
            ((16, 1, 1024), (1, 64, 4096)),
            ((16, 1, 1024), (1, 512, 512)),
            ((32, 1, 512), (1, 2048, 2048)),
        ),
        steps_window=16384,
        steps_repeats=2,
        accuracy_layers=8,
        accuracy_len=700,
        num_sessions=16,
        history_len=6000,
        num_turns=3,
        prompt_len=500,
        output_len=32,
        active=(8, 16),
        active_others=(4, 8),
        active_peer=(8,),
        max_num_batched_tokens=8192,
    )


def for_smoke() -> Setting:
    return Setting(
        is_smoke=True,
        device=torch.device("cpu"),
        dtype=torch.float32,  # the interpreter of Triton is wrong in bfloat16
        models={"tiny Llama": TINY_LLAMA, "tiny OPT": TINY_OPT},
        repeats=1,
        copy_bytes=1 << 16,
        read_bytes=1 << 16,
        matrix_size=64,
        attention=((2, 1, 40), (1, 5, 40), (1, 20, 20)),
        first_call_lens=(11, 13),
        tiles_decode=((2, 1, 40),),
        tiles_prompt=((1, 5, 40),),
        decode_keys=(16, 32),
        decode_warps=(4,),
        decode_programs=(2,),
        prompt_programs=(1,),
        prompt_tiles=((16, 16, 4),),
        stages=(3,),
        figure_12=(16,),
        figure_12_batch=1,
        figure_12_new=2,
        decode_batches=(1, 2),
        decode_context=32,
        decode_steps=3,
        compared_steps=2,
        prefill_len=32,
        overhead_batch=2,
        overhead_steps=3,
        num_swapped_blocks=2,
        transfers=((32, 8),),
        prompt_lens=(8,),
        step_sizes=(((2, 1, 40),), ((1, 20, 20),), ((2, 1, 40), (1, 5, 40))),
        steps_window=128,
        steps_repeats=1,
        accuracy_layers=1,
        accuracy_len=12,
        num_sessions=3,
        history_len=30,
        num_turns=2,
        prompt_len=20,
        output_len=3,
        active=(1, 2),
        active_others=(1, 2),
        active_peer=(2,),
        max_num_batched_tokens=64,
    )
