"""The options of an engine: one frozen, validated value, whoever sets it (YAML, command line, Python). Names follow vLLM's
where it has the same thing. Opens no file and no device.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Union

from engine.core.cache.eviction import EVICTION_POLICIES
from engine.core.config import CacheOptions, SchedulingOptions
from engine.errors import ConfigError

MODES = ("pensieve", "stateless")
MODE_ALIASES = {"vllm": "stateless"}
ATTENTION_BACKENDS = ("auto", "triton", "flashinfer", "cpu", "reference")
LOAD_FORMATS = ("auto", "dummy")
SWAP_COPIES = ("auto", "dma", "kernel")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(CacheOptions, SchedulingOptions):
    """Options of one engine; raises ConfigError, which names the option and the remedy.

    model: "embedded" (the recall model), "smollm2" (the chat model of `make install`), "auto" (that one if it is there, else
    the recall model), a .gguf file, a local folder, or a hub id. served_model_name: what clients call it; None = derived.
    mode: "pensieve" keeps KV between turns, "stateless" (alias "vllm") nothing. dtype: "auto" = the checkpoint's on a GPU; on
    a CPU bfloat16 where it computes in that, else float32. device: "auto", "cpu", "cuda" or "cuda:N". max_model_len: window
    in tokens, prompt and answer; None = the model's, or what the GPU tier holds. chunk_size: tokens a chunk. num_gpu_blocks:
    size of the GPU tier in chunks; None = from gpu_memory_gib, and without it from gpu_memory_utilization on a GPU and 1 GiB
    on a CPU. num_cpu_blocks, kv_offloading_size (GiB): size of the CPU tier, 0 = none. max_num_seqs: most requests that run
    at once. max_num_batched_tokens: token budget of a step. prefill_batch_tokens: further prompts join a step only while its
    prompts have fewer tokens; None = 128 on a CPU, which computes no faster with more, and on a GPU no limit but that budget.
    max_num_queued_reqs, max_num_queued_tokens: how many requests, and with how many tokens in all (None = any), may wait to
    be started; more are refused. decode_reserve: share of GPU blocks that admission leaves free. swap_out_watermark: share of
    free and reclaimable GPU blocks under which chunks are swapped out ahead of time. write_through: copy what a turn leaves
    to the CPU tier at its end, not only under the watermark. verify_swaps: checksum every block on its way; a wrong one is
    dropped and recomputed. profile: file that `pensieve profile` wrote; None = the one in the user's cache folder, if any.
    num_threads: CPU threads of the model; None = the cores that the process was given. attention_backend: "triton" (the
    kernel for GPUs), "flashinfer" (FlashInfer, an optional package), "cpu" (the C++ kernel), "reference" (torch's
    operations), or "auto": on a GPU the faster of the first two, as measured at the start if both can serve the model; else
    "cpu" or "reference", the first of them that runs here. load_format: "auto" reads the weights, "dummy" makes random ones
    on the device, for measurements. enforce_eager: no CUDA graphs, no compiled layers. swap_copies: between GPU and
    pinned host memory by "dma" (copy engines), by "kernel" (a copy kernel), or "auto", as measured at the start.
    pack_weights: lay the weights of linear layers out for the CPU's matrix kernels and join those that share their
    input, where that works. compile_layers: compile the decoder layers with torch.compile, where that works; None = on
    a GPU, where it is measured to be faster. async_scheduling: put the last step into text, and plan and launch the
    next one, while a step runs; the answers are the same. None = on a GPU; where the model computes on the same
    cores, it costs. tensor_parallel_size: ranks that share the model's weights and KV heads, each with a device of its own;
    gpu_memory_gib is for each of them, kv_offloading_size for all together.
    """

    model: str = "embedded"
    served_model_name: str | None = None
    mode: str = "pensieve"
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    num_gpu_blocks: int | None = None
    num_cpu_blocks: int | None = None
    gpu_memory_gib: float | None = None
    gpu_memory_utilization: float = 0.9
    kv_offloading_size: float = 1.0
    verify_swaps: bool = False
    profile: str | None = None
    num_threads: int | None = None
    attention_backend: str = "auto"
    load_format: str = "auto"
    enforce_eager: bool = False
    swap_copies: str = "auto"
    pack_weights: bool = True
    compile_layers: bool | None = None
    async_scheduling: bool | None = None
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_type(field.name, typing.get_type_hints(EngineConfig)[field.name])
        object.__setattr__(self, "mode", MODE_ALIASES.get(self.mode, self.mode))

        def check(ok: bool, name: str, must: str) -> None:
            if not ok:
                raise ConfigError(f"{name} must be {must}, got {getattr(self, name)!r}", param=name)

        check(bool(self.model), "model", "'auto', 'smollm2', 'embedded', a .gguf file, a local folder or a hub id")
        check(self.mode in MODES, "mode", "'pensieve' or 'stateless' (alias 'vllm')")
        for name, values in (
            ("attention_backend", ATTENTION_BACKENDS),
            ("dtype", DTYPES),
            ("load_format", LOAD_FORMATS),
            ("swap_copies", SWAP_COPIES),
        ):
            check(getattr(self, name) in values, name, "one of " + ", ".join(values))
        check(
            self.load_format == "auto" or self.tensor_parallel_size == 1,
            "load_format",
            "auto where tensor_parallel_size is above 1: random weights are made whole",
        )
        check(
            not self.compile_layers or self.tensor_parallel_size == 1,
            "compile_layers",
            "false where tensor_parallel_size is above 1: sharded layers are not compiled",
        )
        check(not (self.compile_layers and self.enforce_eager), "compile_layers", "false where enforce_eager is set")
        check(
            re.fullmatch("auto|cpu|cuda(:[0-9]+)?", self.device) is not None,
            "device",
            "auto, cpu or cuda[:N]",
        )
        check(
            self.eviction_policy in EVICTION_POLICIES,
            "eviction_policy",
            "one of " + ", ".join(EVICTION_POLICIES),
        )
        for name in (
            "max_model_len",
            "num_gpu_blocks",
            "num_threads",
            "max_num_queued_tokens",
            "prefill_batch_tokens",
        ):
            value = getattr(self, name)
            check(value is None or value >= 1, name, "at least 1")
        for name in (
            "chunk_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_queued_reqs",
            "tensor_parallel_size",
        ):
            check(getattr(self, name) >= 1, name, "at least 1")
        check(self.gpu_memory_gib is None or self.gpu_memory_gib > 0, "gpu_memory_gib", "above 0")
        check(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "above 0 and at most 1")
        for name in ("decode_reserve", "swap_out_watermark"):
            check(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        check(
            self.max_num_seqs <= self.max_num_batched_tokens,
            "max_num_seqs",
            f"at most max_num_batched_tokens ({self.max_num_batched_tokens}): each running request takes a token a step",
        )
        check(self.num_cpu_blocks is None or self.num_cpu_blocks >= 0, "num_cpu_blocks", "at least 0")
        check(self.kv_offloading_size >= 0, "kv_offloading_size", "at least 0")

    def _check_type(self, name: str, hint: Any) -> None:
        allowed = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
        value = getattr(self, name)
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(self, name, float(value))
        elif not isinstance(value, tuple(allowed)) or (isinstance(value, bool) and bool not in allowed):
            kinds = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ConfigError(f"{name} must be {kinds}, got {value!r}", param=name)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """From a mapping, as YAML or keyword arguments give it. Unknown options are errors."""
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]!r}? Known" if close else "known"
                raise ConfigError(f"unknown option {name!r}; {hint} are {', '.join(sorted(known))}", param=name)
        return cls(**options)
