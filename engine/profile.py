"""Measures what the cost model needs, by running steps (paper section 4.3.1, offline profiling).

That is the time to compute one chunk by context length, and the time to move one block between the tiers, the disk included
if there is one. Keeps it in a small JSON file per model, dtype, device and tensor-parallel size, which names what else it
depends on: weights, processor, attention backend, version of torch.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.config import EngineConfig
from engine.core.cache.cost_model import CostModel
from engine.core.executor_protocol import Executor, ExecutorFacts
from engine.core.plan import BlockCopy, QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.core.tier_table import CPU, GPU
from engine.errors import ConfigError
from engine.executor.group import make_executor
from engine.executor.tiers.disk_device import device_of
from engine.executor.tiers.disk_format import IDENTITY_BYTES, Layout
from engine.executor.tiers.disk_store import DiskSpeed, DiskStore
from engine.executor.tiers.disk_tier import DISK
from engine.paths import cache_folder, private_folder, write_private_file

logger = logging.getLogger(__name__)

MIN_CONTEXT_LEN = 64
NUM_SWAPPED_BLOCKS = 64
NUM_CHUNKS_AT_ONCE = 8
MAX_MEASURED_BYTES = 1 << 28  # of a disk, at a time
CPUINFO = Path("/proc/cpuinfo")
# Of a step, however fast copies are: more at a time save nothing, and would fill the CPU tier in a burst.
MAX_SWAP_OUTS = 64


@dataclass(frozen=True, slots=True)
class ProfileIdentity:
    """What a profile was measured with.

    device: with the number of threads, if it is a CPU.
    fingerprint: of the model, see LoadedModel.
    processor: of the machine.
    attention: the backend in use.
    pack_weights: the option.
    torch: its version.
    kv_cold_dtype: the option.
    """

    model: str
    dtype: str
    device: str
    tensor_parallel_size: int
    fingerprint: str
    processor: str
    attention: str
    pack_weights: bool
    torch: str
    kv_cold_dtype: str = "same"

    def differences(self, other: ProfileIdentity) -> str:
        """In words; empty if there are none."""
        pairs = [(field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return ", ".join(f"{name} {mine!r} and not {theirs!r}" for name, mine, theirs in pairs if mine != theirs)


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured, medians.

    identity: of what. bytes_per_block: of one as it moves between tiers.

    chunk_s: context length -> seconds of a step that computes one chunk that ends there; the slope of the
    line through them is per_context_token_s. constant_s: what one more chunk adds to a step, attention left out: chunks are
    recomputed in batches, so what a step costs anyway counts for none of them. swap_in_s, swap_out_s: seconds per block.
    disk_read_s, disk_write_s: the same between the disk tier and the CPU tier; None = it was measured without `kv_disk_path`.
    disk: which one that was, see device_of.
    """

    identity: ProfileIdentity
    chunk_size: int
    bytes_per_block: int
    chunk_s: dict[int, float]
    constant_s: float
    per_context_token_s: float
    swap_in_s: float
    swap_out_s: float
    disk_read_s: float | None = None
    disk_write_s: float | None = None
    disk: str | None = None

    @property
    def model(self) -> str:
        return self.identity.model

    @property
    def dtype(self) -> str:
        return self.identity.dtype

    @property
    def device(self) -> str:
        return self.identity.device

    def cost_model(self, chunk_size: int, disk: str | None = None) -> CostModel:
        """In seconds, for any chunk size: all terms but the context's are per token of the chunk.

        disk: the one that is used; of another one than was measured, the price is not known.
        """
        scale = chunk_size / self.chunk_size
        load_costs = {CPU: self.swap_in_s * scale}
        if self.disk_load_s is not None and self.disk == disk:
            load_costs[DISK] = self.disk_load_s * scale
        return CostModel(
            constant=self.constant_s * scale,
            per_context_token=self.per_context_token_s * scale,
            chunk_size=chunk_size,
            load_costs=load_costs,
            is_in_seconds=True,
        )

    def max_swap_outs(self, chunk_size: int) -> int:
        """Blocks that can be copied from the tier that computes in the time of the shortest step: 1 to MAX_SWAP_OUTS."""
        num_blocks = min(self.chunk_s.values()) / (self.swap_out_s * chunk_size / self.chunk_size)
        return max(1, min(int(num_blocks), MAX_SWAP_OUTS))

    @property
    def disk_load_s(self) -> float | None:
        """Seconds to bring a chunk from the disk to the tier that computes; None = not measured."""
        return None if self.disk_read_s is None else self.disk_read_s + self.swap_in_s

    def save(self, path: Path) -> None:
        text = json.dumps(asdict(self), indent=2) + "\n"
        if cache_folder() in path.parents:
            private_folder(path.parent)
            write_private_file(path, text)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile. Raises ConfigError if the file is not one."""
        try:
            data = json.loads(path.read_text())
            data["identity"] = ProfileIdentity(**data["identity"])
            data["chunk_s"] = {int(length): seconds for length, seconds in data["chunk_s"].items()}
            return cls(**data)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is not a profile ({error}); make one with `pensieve profile`", param="profile"
            ) from error


def profile_path(config: EngineConfig, model: str, dtype: str, device: str) -> Path:
    """The file of this model's profile on this device, unless the option `profile` names another."""
    if config.profile is not None:
        return Path(config.profile)
    parts = (model, dtype, device, f"tp{config.tensor_parallel_size}")
    return cache_folder() / "profiles" / (re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(parts)).strip("-") + ".json")


def load_cost_model(config: EngineConfig, facts: ExecutorFacts) -> CostModel:
    """The measured cost model if there is a profile of just this, else one from the model's shape.

    The log says which. Raises ConfigError if the option `profile` names a file that is no profile.
    """
    model = facts.model
    profile = _find_profile(config, facts)
    if profile is not None:
        return profile.cost_model(config.chunk_size, _disk_of(config))
    logger.info("cost model: analytic, from the model's shape; `pensieve profile` measures it")
    return CostModel.from_model_shape(
        num_parameters=model.num_parameters,
        num_layers=model.num_layers,
        num_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        chunk_size=config.chunk_size,
    )


def choose_max_swap_outs(config: EngineConfig, facts: ExecutorFacts) -> int | None:
    """The option; by default as many as the shortest step that was measured can copy beside its computation.

    None = that is not known, or there is nothing beside it, because a CPU copies with the cores that compute.
    """
    if config.max_swap_outs is not None or facts.is_on_cpu:
        return config.max_swap_outs
    profile = _find_profile(config, facts, tells=False)
    return None if profile is None else profile.max_swap_outs(config.chunk_size)


def _find_profile(config: EngineConfig, facts: ExecutorFacts, *, tells: bool = True) -> Profile | None:
    """None if there is none, or one of something else. tells: to the log."""
    wanted = _identify(config, facts)
    path = profile_path(config, wanted.model, wanted.dtype, wanted.device)
    if config.profile is None and not path.exists():
        return None
    try:
        profile = Profile.load(path)
    except ConfigError as error:
        if config.profile is not None:
            raise
        if tells:
            logger.warning("%s", error)  # an earlier version's
        return None
    differences = profile.identity.differences(wanted)
    if differences:
        if tells:
            logger.warning("%s is not used: it is a profile of %s; make one with `pensieve profile`", path, differences)
        return None
    if tells:
        logger.info("cost model: measured, from %s", path)
    return profile


def measure_profile(config: EngineConfig, *, repeats: int = 5) -> Profile:
    """Load the model and measure; minutes for a large one. Uses tiers of its own, just large enough."""
    probe = replace(config, num_gpu_blocks=1, num_cpu_blocks=0, mode="pensieve", profile=None, enforce_eager=True)
    executor = make_executor(probe)
    window = executor.facts.model.window(config.max_model_len)
    executor.shutdown()
    num_blocks = max(-(-window // config.chunk_size), NUM_SWAPPED_BLOCKS)
    executor = make_executor(replace(probe, num_gpu_blocks=num_blocks, num_cpu_blocks=NUM_SWAPPED_BLOCKS))
    try:
        lengths = [1 << power for power in range(MIN_CONTEXT_LEN.bit_length() - 1, window.bit_length())]
        lengths = [length for length in lengths if config.chunk_size <= length <= window]
        if len(lengths) < 2 or window < NUM_CHUNKS_AT_ONCE * config.chunk_size:
            raise ConfigError(f"a window of {window} tokens is too small to profile", param="max_model_len")
        chunk_s = _measure_chunks(executor, config.chunk_size, lengths, repeats)
        slope = max(0.0, statistics.linear_regression(list(chunk_s), list(chunk_s.values())).slope)
        constant = _measure_one_more_chunk(executor, config.chunk_size, repeats, slope)
        swap_out_s = measure_swaps(executor, repeats, is_in=False)
        swap_in_s = measure_swaps(executor, repeats, is_in=True)
        disk = _measure_disk(config, executor.facts.bytes_per_cold_block, repeats)
        return Profile(
            identity=_identify(config, executor.facts),
            chunk_size=config.chunk_size,
            bytes_per_block=executor.facts.bytes_per_cold_block,
            chunk_s=chunk_s,
            constant_s=constant,
            per_context_token_s=slope,
            swap_in_s=swap_in_s,
            swap_out_s=swap_out_s,
            disk_read_s=None if disk is None else disk.read_s,
            disk_write_s=None if disk is None else disk.write_s,
            disk=_disk_of(config),
        )
    finally:
        executor.shutdown()


def plot_profile(profile: Profile, path: Path) -> None:
    """The measured points and the line through them, as a PNG."""
    import matplotlib.figure  # slow to import, and only a plot needs it

    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lengths = list(profile.chunk_s)
    axes.plot(
        lengths, [seconds * 1e3 for seconds in profile.chunk_s.values()], "o", label="a step of one chunk, measured"
    )
    line = [(profile.constant_s + profile.per_context_token_s * length) * 1e3 for length in lengths]
    terms = f"{profile.constant_s * 1e3:.3g} ms + {profile.per_context_token_s * 1e9:.3g} ns/token"
    axes.plot(lengths, line, "-", label=f"one more chunk in a step: {terms}")
    axes.axhline(profile.swap_in_s * 1e3, linestyle="--", color="gray", label="swap in one block")
    axes.set(
        xlabel="context length (tokens)",
        ylabel="ms",
        title=f"{profile.model}: computing one chunk of {profile.chunk_size} tokens",
        ylim=(0, None),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _measure_chunks(executor: Executor, chunk_size: int, lengths: list[int], repeats: int) -> dict[int, float]:
    """Median seconds of a step that computes one chunk at the end of a context, by the context's length.

    The first repeat is not counted.
    """
    samples: dict[int, list[float]] = {length: [] for length in lengths}
    num_tokens = lengths[-1]
    vocab_size = executor.facts.model.vocab_size
    tokens = tuple(i % vocab_size for i in range(num_tokens))
    table = tuple(range(-(-num_tokens // chunk_size)))
    start = RequestStart("profile", num_tokens, num_tokens, SamplingParams(temperature=0.0), (), table)
    # Every position is written once, so that no step reads what was never computed.
    executor.execute(StepPlan(0, (QuerySegment("profile", 0, tokens),), (start,)))
    rounds = tqdm(range(repeats + 1), desc="profiling", unit="round", disable=not sys.stderr.isatty())
    for number in rounds:
        for length in lengths:
            begin = length - chunk_size
            plan = StepPlan(0, (QuerySegment("profile", begin, tokens[begin:length], samples=True),))
            seconds = timed(executor, plan)
            if number:
                samples[length].append(seconds)
    return {length: statistics.median(values) for length, values in samples.items()}


def _measure_one_more_chunk(executor: Executor, chunk_size: int, repeats: int, slope: float) -> float:
    """Seconds that a chunk adds to a step of several, without attention.

    slope: seconds of attention per token of context.
    """
    num_chunks = NUM_CHUNKS_AT_ONCE
    vocab_size = executor.facts.model.vocab_size
    tokens = tuple(i % vocab_size for i in range(num_chunks * chunk_size))
    plans = [StepPlan(0, (QuerySegment("profile", 0, tokens[: n * chunk_size]),)) for n in (1, num_chunks)]
    seconds = [[timed(executor, plan) for plan in plans] for _ in range(2 * repeats + 1)][1:]
    one, many = (statistics.median(column) for column in zip(*seconds, strict=True))
    mean_context_len = (num_chunks + 2) / 2 * chunk_size  # of the 2nd to the last chunk
    return max(float(many - one) / (num_chunks - 1) - slope * mean_context_len, 1e-9)


def measure_swaps(executor: Executor, repeats: int, *, is_in: bool) -> float:
    """Median seconds per block."""
    source, target = (CPU, GPU) if is_in else (GPU, CPU)
    copies = tuple(BlockCopy(source, i, target, i) for i in range(NUM_SWAPPED_BLOCKS))
    plan = StepPlan(0, (), swap_ins=copies) if is_in else StepPlan(0, (), swap_outs=copies)
    seconds = [timed(executor, plan) for _ in range(repeats + 1)][1:]
    return statistics.median(seconds) / NUM_SWAPPED_BLOCKS


def _measure_disk(config: EngineConfig, bytes_per_block: int, repeats: int) -> DiskSpeed | None:
    """Medians for a block; None without a disk tier. Raises ConfigError if the disk cannot be used."""
    if config.kv_disk_path is None:
        return None
    path = Path(config.kv_disk_path).expanduser() / "profile"
    store = DiskStore(path, Layout(bytes(IDENTITY_BYTES), bytes_per_block, 1, config.chunk_size))
    try:
        num_slots = max(1, min(NUM_SWAPPED_BLOCKS, MAX_MEASURED_BYTES // bytes_per_block))
        measured = [store.measure(num_slots) for _ in range(repeats)]
        return DiskSpeed(*(statistics.median(column) for column in zip(*measured, strict=True)))
    except OSError as error:
        raise ConfigError(f"{path} cannot be measured: {error}; name another folder", param="kv_disk_path") from error
    finally:
        store.close()
        shutil.rmtree(path, ignore_errors=True)


def _disk_of(config: EngineConfig) -> str | None:
    """Where the disk tier is to be; None if there is none, or it cannot be said."""
    if config.kv_disk_path is None:
        return None
    try:
        return device_of(Path(config.kv_disk_path).expanduser())
    except OSError:
        return None


def timed(executor: Executor, plan: StepPlan) -> float:
    start = time.perf_counter()
    executor.execute(plan)
    if not executor.facts.is_on_cpu:
        torch.cuda.synchronize(executor.facts.device)
    return time.perf_counter() - start


def _identify(config: EngineConfig, facts: ExecutorFacts) -> ProfileIdentity:
    return ProfileIdentity(
        model=config.model,
        dtype=facts.model.dtype,
        device=_device_name(facts),
        tensor_parallel_size=config.tensor_parallel_size,
        fingerprint=facts.model.fingerprint,
        processor=_processor_name(),
        attention=facts.attention_backend,
        pack_weights=config.pack_weights,
        torch=torch.__version__,
        kv_cold_dtype=config.kv_cold_dtype,
    )


def describe_machine(config: EngineConfig, facts: ExecutorFacts) -> str:
    """What figures of it are measured with, in words."""
    identity = _identify(config, facts)
    return f"{identity.model}, {identity.dtype}, {identity.device}, {identity.processor}, {identity.attention}"


def _processor_name() -> str:
    """As the system calls it."""
    try:
        lines = CPUINFO.read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _device_name(facts: ExecutorFacts) -> str:
    if not facts.is_on_cpu:
        return str(torch.cuda.get_device_name(facts.device))
    return f"cpu-{platform.machine()}-{torch.get_num_threads()}-threads"


def describe_disk_gain(profile: Profile) -> str:
    """For which chunks loading from the disk is not slower than computing, and how fast it would have to be read for more."""
    assert profile.disk_load_s is not None
    assert profile.disk_read_s is not None
    model, load_s, window = profile.cost_model(profile.chunk_size), profile.disk_load_s, max(profile.chunk_s)
    read_gb_s = profile.bytes_per_block / profile.disk_read_s / 1e9

    def enough_gb_s(position: int) -> str:
        """To read this chunk in the time that it takes to compute it, the copy to the GPU tier left out."""
        left_s = model.chunk_cost(position) - profile.swap_in_s
        return f"{profile.bytes_per_block / left_s / 1e9:.3f} GB/s" if left_s > 0 else "no speed"

    last = window // profile.chunk_size - 1
    if load_s <= model.chunk_cost(0):
        return f"everywhere in a context: {enough_gb_s(0)} would be enough, and it is read at {read_gb_s:.3f} GB/s"
    if load_s <= model.chunk_cost(last):
        first_len = int((load_s - profile.constant_s) / profile.per_context_token_s)
        return f"behind the first {first_len} tokens of a context; {enough_gb_s(0)} would be enough for all of it"
    return f"nowhere within {window} tokens: {enough_gb_s(last)} would be enough for the last ones, {enough_gb_s(0)} for all"


def describe_profile(profile: Profile) -> dict[str, Any]:
    """For people: rates instead of seconds."""
    in_gb_s, out_gb_s = (profile.bytes_per_block / s / 1e9 for s in (profile.swap_in_s, profile.swap_out_s))
    disk = {}
    if profile.disk_read_s is not None and profile.disk_write_s is not None:
        disk["disk"] = str(profile.disk)
        for name, seconds in (("disk reads", profile.disk_read_s), ("disk writes", profile.disk_write_s)):
            disk[name] = f"{seconds * 1e3:.3f} ms a block, {profile.bytes_per_block / seconds / 1e9:.3f} GB/s"
        disk["a disk tier pays"] = describe_disk_gain(profile)
    return {
        "model": profile.model,
        "dtype": profile.dtype,
        "device": profile.device,
        "ranks": profile.identity.tensor_parallel_size,
        "chunk, without attention": f"{profile.constant_s * 1e3:.3f} ms",
        "attention per 1024 tokens of context": f"{profile.per_context_token_s * 1024e3:.3f} ms",
        "swap in": f"{profile.swap_in_s * 1e3:.3f} ms a block, {in_gb_s:.2f} GB/s",
        "swap out": f"{profile.swap_out_s * 1e3:.3f} ms a block, {out_gb_s:.2f} GB/s",
        **disk,
    }
