"""Paged attention by the C++ kernel of paged_cpu.cpp.

Builds it once per machine, if there is a compiler, and keeps it in the cache folder; `python -m engine.attention.cpu` does so
ahead of time. Its oracle is reference.py.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock

from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionMetadata, AttentionParams
from engine.errors import KernelBuildError
from engine.paths import cache_folder, private_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("paged_cpu.cpp")
COMPILERS = ("g++", "clang++", "c++")
# What ATen's Vectorized needs to be told, by the capability that torch itself found on this processor.
_ISA_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
    "AVX512": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAN_REPLAY_DECODES = True
SKIPS_EMPTY_SEGMENTS = False


def load(
    device: torch.device, dtype: torch.dtype, calls: Sequence[AttentionCall], chunk_size: int
) -> tuple[AttentionBackend, str]:
    """See AttentionLoader."""
    if device.type != "cpu":
        raise KernelBuildError(f"the model is on {device}; use 'auto'")
    if dtype not in DTYPES:
        raise KernelBuildError(f"its kernel does not compute in {dtype}; use 'reference'")
    return sys.modules[__name__], f"C++ kernel (cpu), {load_kernel()}"


def load_kernel() -> str:
    """Make the kernel callable, and build it if that has not been done.

    Returns the instruction set that it was built for. Raises KernelBuildError if it cannot be built.
    """
    capability: str = torch.backends.cpu.get_cpu_capability()
    if not hasattr(torch.ops.pensieve, "paged_attention"):
        try:
            torch.ops.load_library(str(_build(capability)))
        except OSError as error:  # a cache folder that cannot be written, a library that does not fit this machine
            raise KernelBuildError(f"the attention kernel cannot be stored or loaded: {error}") from error
    return capability


def write_kv(
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    metadata: AttentionMetadata,
) -> None:
    """See AttentionBackend."""
    torch.ops.pensieve.write_kv(k_pool, v_pool, key, value, metadata.slot_mapping)


def attend(
    query: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    metadata: AttentionMetadata,
    params: AttentionParams,
) -> torch.Tensor:
    """See AttentionBackend."""
    out: torch.Tensor = torch.ops.pensieve.paged_attention(
        query,
        k_pool,
        v_pool,
        metadata.segments,
        metadata.block_tables,
        params.scaling,
        params.sliding_window or 0,
        params.softcap or 0.0,
        params.sinks,
    )
    return out


def _build(capability: str) -> Path:
    """Return the library for this source, torch, processor and compiler; build it unless it is there.

    Without a compiler, one that another compiler has built. Raises KernelBuildError or OSError.
    """
    torch_folder = Path(torch.__file__).parent
    flags = [
        "-O3",
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-fopenmp",
        "-DAT_PARALLEL_OPENMP=1",
        *_ISA_FLAGS.get(capability, ()),
    ]
    paths = [
        *(f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"),
        *(str(SOURCE), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    # Not by where they are: checkouts share what is the same.
    key = _digest(SOURCE.read_text(), torch.__version__, str(torch.version.git_version), platform.machine(), *flags)
    folder = private_folder(cache_folder() / "kernels")
    name = f"paged_cpu-{capability.lower()}-{key}"
    try:
        compiler, version = _find_compiler()
    except KernelBuildError:
        if built := sorted(folder.glob(f"{name}-*.so")):
            return built[0]
        raise
    library = folder / f"{name}-{_digest(*compiler, version)}.so"
    if library.exists():
        return library
    with FileLock(library.with_suffix(".lock"), mode=0o600):  # replicas of one machine start at the same time
        if not library.exists():
            logger.info("building the attention kernel for %s, once; takes half a minute", capability)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                made = Path(temporary) / library.name
                _compile([*compiler, *flags, *paths, "-o", str(made)])
                made.chmod(0o600)
                os.replace(made, library)
    return library


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _find_compiler() -> tuple[list[str], str]:
    """Its command, and what it says of its version. Raises KernelBuildError if there is none."""
    commands = [[path] for name in COMPILERS if (path := shutil.which(name))]
    if os.environ.get("CXX"):
        commands = [shlex.split(os.environ["CXX"])]
    if not commands:
        raise KernelBuildError(
            f"no C++ compiler: found none of {', '.join(COMPILERS)}; install one (Debian: apt-get install g++), or set CXX"
        )
    try:
        version = subprocess.run([*commands[0], "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise _build_error(commands[0], error) from error
    return commands[0], version


def _compile(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise _build_error(command, error) from error


def _build_error(command: list[str], error: Exception) -> KernelBuildError:
    reason = getattr(error, "stderr", None) or str(error)
    return KernelBuildError(f"{command[0]} could not build the attention kernel: {reason[-2000:]}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(f"attention kernel for {load_kernel()}: ready")
    except KernelBuildError as error:
        print(f"no attention kernel, torch's operations will be used: {error}", file=sys.stderr)
