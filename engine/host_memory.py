"""Whether the memory of this machine can hold the weights and the tiers.

It says what to lower before memory is full, because a full machine ends processes without a word. Knows no torch.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

GIB = 1 << 30
MEMINFO = Path("/proc/meminfo")
# The control groups of this process, and where their limits are: by version 2, and by version 1 for the controller "memory".
CONTROL_GROUPS = Path("/proc/self/cgroup")
GROUP_LIMITS = {"": Path("/sys/fs/cgroup/memory.max"), "memory": Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")}


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes that this process could ever have, and those that nothing uses now."""

    total: int
    available: int

    def __str__(self) -> str:
        return f"{self.total / GIB:.1f} GiB, of which {self.available / GIB:.1f} are free"


def host_memory() -> HostMemory | None:
    """None on a system that does not say."""
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return None
    for path in _limit_files():
        with suppress(OSError, ValueError):  # 'max' or very much = no limit
            total = min(total, int(path.read_text()))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)  # `ulimit -v`
    if address_space != resource.RLIM_INFINITY:
        total = min(total, address_space)
    return HostMemory(total, min(total, available))


def _limit_files() -> Iterator[Path]:
    """The files with the limits of this process's control group and of those around it.

    In a container its group is the root, whatever its name is.
    """
    yield from GROUP_LIMITS.values()
    with suppress(OSError, ValueError):
        for line in CONTROL_GROUPS.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            for controller in controllers.split(","):
                if controller in GROUP_LIMITS:
                    limit = GROUP_LIMITS[controller]
                    parts = Path(name).parts[1:]
                    yield from (limit.parent.joinpath(*parts[:depth], limit.name) for depth in range(1, len(parts) + 1))


def check_weights(model: str, num_bytes: int) -> None:
    """Raise ConfigError if weights of that size are larger than host memory."""
    memory = host_memory()
    if memory is not None and num_bytes > memory.total:
        raise ConfigError(
            f"the weights of {model!r} take {num_bytes / GIB:.1f} GiB of host memory, but this process can use {memory}; "
            "use a smaller model, or dtype bfloat16 instead of float32",
            param="model",
        )


def check_tiers(config: EngineConfig, num_gpu_tier_bytes: int, num_cpu_tier_bytes: int) -> None:
    """Raise ConfigError if the tiers in host memory are larger than it; warn if larger than what is free.

    Their memory is taken as they fill: without this check, the system would end the process weeks after the start.
    """
    memory, num_bytes = host_memory(), num_gpu_tier_bytes + num_cpu_tier_bytes
    if memory is None or num_bytes <= memory.available:
        return
    sizes = {_gpu_tier_option(config): num_gpu_tier_bytes, _cpu_tier_option(config): num_cpu_tier_bytes}
    option = max(sizes, key=lambda name: sizes[name])
    parts = ", ".join(f"{size / GIB:.1f} GiB for {name}" for name, size in sizes.items() if size)
    if num_bytes > memory.total:
        raise ConfigError(
            f"the tiers take {num_bytes / GIB:.1f} GiB of host memory ({parts}), but this process can use {memory}; "
            f"lower {option}",
            param=option,
        )
    logger.warning(
        "the tiers take %.1f GiB of host memory (%s) once they are full, of %s", num_bytes / GIB, parts, memory
    )


def _gpu_tier_option(config: EngineConfig) -> str:
    return "gpu_memory_gib" if config.num_gpu_blocks is None else "num_gpu_blocks"


def _cpu_tier_option(config: EngineConfig) -> str:
    return "kv_offloading_size" if config.num_cpu_blocks is None else "num_cpu_blocks"
