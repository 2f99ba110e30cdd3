"""`pensieve size`: what a model needs, and how large the tiers should be for so many users. Decides by engine/sizing.py."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from engine.config import COLD_DTYPES, EngineConfig
from engine.errors import ConfigError
from engine.sizing import ACTIVATIONS_GIB, DEVICES, GIB, KIB, ModelSize, device_gib, measure_model, size_tiers

DESCRIPTION = "Say what a model needs of a GPU, and how large the tiers have to be for so many users"
DEFAULT_CONTEXT = 8192


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, help="A local folder or a hub id; only its configuration is read")
    parser.add_argument(
        *("--gpu", "--gpu-gib"),
        metavar="NAME|GIB",
        default="h100",
        help=f"One of {', '.join(DEVICES)}, or the memory that it shows, in GiB (default: h100)",
    )
    parser.add_argument("--gpus", type=int, metavar="N", default=1, help="That share the model (default: 1)")
    parser.add_argument("--dtype", default="auto", help="Of weights and KV; auto = the model's own (default: auto)")
    parser.add_argument(
        "--kv-cold-dtype", choices=COLD_DTYPES, default="same", help="Of the tiers behind the GPU's (default: same)"
    )
    parser.add_argument(
        "--users", type=int, metavar="N", default=100, help="Conversations that are to stay cached (default: 100)"
    )
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="Length of each, or less for a short model (default: 8192)"
    )
    parser.add_argument(
        *("--gpu-memory-utilization",),
        type=float,
        metavar="X",
        default=EngineConfig().gpu_memory_utilization,
        help="As the engine's option (default: 0.9)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the sizes and the lines of a config file; 1 if the weights do not fit. Raises ConfigError, ModelLoadError."""
    for name, number in (("gpus", arguments.gpus), ("users", arguments.users), ("context", arguments.context)):
        if number is not None and number < 1:
            raise ConfigError(f"--{name} must be at least 1, got {number}", param=name)
    if not 0 < arguments.gpu_memory_utilization <= 1:
        given = arguments.gpu_memory_utilization
        raise ConfigError(
            f"--gpu-memory-utilization must be above 0 and at most 1, got {given:g}", param="gpu_memory_utilization"
        )
    gib = device_gib(arguments.gpu)
    size, dtype = measure_model(arguments.model, arguments.gpus, arguments.dtype, arguments.kv_cold_dtype)
    num_tokens = arguments.context or min(DEFAULT_CONTEXT, size.window or DEFAULT_CONTEXT)
    if size.window is not None and num_tokens > size.window:
        raise ConfigError(
            f"--context {num_tokens} is more than the model's window of {size.window} tokens", param="context"
        )
    demand = Demand(arguments.users, num_tokens, gib, arguments.gpu_memory_utilization, arguments.kv_cold_dtype)
    print("\n".join(describe(arguments.model, dtype, size, demand)))
    return 0 if demand.fits(size) else 1


@dataclass(frozen=True, slots=True)
class Demand:
    """So many conversations of so many tokens, on devices of so many GiB, of which this share may be used.

    kv_cold_dtype: the option of the engine.
    """

    num_users: int
    num_tokens: int
    gib: float
    utilization: float
    kv_cold_dtype: str = "same"

    def fits(self, size: ModelSize) -> bool:
        """Whether one conversation fits the GPU tier: less cannot be served."""
        tiers = size_tiers(size, self.gib, self.utilization, self.num_users, self.num_tokens)
        return tiers.gpu_tokens >= self.num_tokens


def describe(model: str, dtype: str, size: ModelSize, demand: Demand) -> list[str]:
    """What is printed, line by line."""
    tiers = size_tiers(size, demand.gib, demand.utilization, demand.num_users, demand.num_tokens)
    ranks = "" if size.num_ranks == 1 else f" / {size.num_ranks} GPUs = {_gib(size.rank_weight_bytes / GIB)}"
    kv = "" if size.num_ranks == 1 else f" / {size.num_ranks} GPUs = {size.rank_kv_bytes / KIB:g} KiB"
    lines = [
        f"{model}, {dtype}",
        f"  weights    {_gib(size.weight_bytes / GIB)}{ranks}",
        f"  KV         {size.kv_bytes / KIB:g} KiB{kv} a token",
        f"  GPU tier   {demand.gib:g} GiB x {demand.utilization:g} - {_gib(size.rank_weight_bytes / GIB)} of weights - "
        f"{ACTIVATIONS_GIB:g} GiB for the largest step = {_gib(tiers.gpu_gib)}: {max(0, tiers.gpu_tokens):,} tokens",
    ]
    if not demand.fits(size):
        too_large = f"a conversation of {demand.num_tokens:,} tokens does not fit"
        return [*lines, f"  {too_large}: take more or larger GPUs, another model, or a shorter --context"]
    num_in_gpu = min(demand.num_users, tiers.gpu_tokens // demand.num_tokens)
    window = tiers.gpu_tokens if size.window is None else min(size.window, tiers.gpu_tokens)
    lines += [
        f"  {demand.num_users:,} conversations of {demand.num_tokens:,} tokens: {num_in_gpu:,} in the GPU tier",
        f"  CPU tier   {_gib(tiers.cpu_gib)} for the others",
        f"  disk tier  {_gib(tiers.disk_gib)} for all of them, so that they outlive a restart",
        "",
        "engine:",
        f"  model: {model}",
        f"  dtype: {dtype}",
    ]
    if size.num_ranks > 1:
        lines.append(f"  tensor_parallel_size: {size.num_ranks}")
    if demand.kv_cold_dtype != "same":
        lines.append(f"  kv_cold_dtype: {demand.kv_cold_dtype}")
    lines += [
        f"  max_model_len: {window}",
        f"  gpu_memory_utilization: {demand.utilization:g}",
        f"  kv_offloading_size: {max(1, math.ceil(tiers.cpu_gib))}"
        + ("   # of all ranks together" if size.num_ranks > 1 else ""),
        "  # kv_disk_path: /var/cache/pensieve",
        # A 32nd of it is for what conversations have said.
        f"  # kv_disk_size: {max(1, math.ceil(tiers.disk_gib * 32 / 31))}",
    ]
    return lines


def _gib(number: float) -> str:
    return f"{number:.1f} GiB" if abs(number) >= 1 else f"{number * 1024:.0f} MiB"
