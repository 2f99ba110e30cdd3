"""Builds a C++ source of the engine as a shared library, once per machine, and keeps it in the cache folder; loads it.

Knows neither what a kernel does nor how it is called.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from engine.errors import KernelBuildError
from engine.paths import cache_folder, private_folder

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++", "c++")
# By the capability that torch itself found on this processor.
ISA_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
}
# What a compiler said of what it could not build. It is not tried again in this process, even if the cause (no memory, a full
# disk) may have passed: each weight of a model asks for its kernel.
_failures: dict[Path, str] = {}
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared")


def load_library(source: Path, kind: str, capability: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library for this source, processor and compiler, for ctypes; built unless it is there.

    kind, capability, flags: see `build_library`.

    Raises KernelBuildError.
    """
    try:
        return ctypes.CDLL(str(build_library(source, kind, capability, flags)))
    except OSError as error:  # a cache folder that cannot be written, a library that does not fit this machine
        raise KernelBuildError(f"the {kind} kernel cannot be stored or loaded: {error}") from error


def build_library(
    source: Path,
    kind: str,
    capability: str,
    flags: Sequence[str] = (),
    paths: Sequence[str] = (),
    made_with: Sequence[str] = (),
) -> Path:
    """Return the library for this source, processor and compiler; build it unless it is there.

    Without a compiler, one that another compiler has built.

    kind: of kernel, for people.
    capability: the instruction set, for the file's name and for people.
    flags: of the compiler, beside the usual ones.
    paths: of headers and libraries. Their places do not count: checkouts share what is the same.
    made_with: what the library depends on beside these, such as torch's version.

    Raises KernelBuildError, or OSError if the cache folder cannot be used.
    """
    flags = (*_FLAGS, *flags)
    key = _digest(source.read_text(), *made_with, platform.machine(), *flags)
    folder = private_folder(cache_folder() / "kernels")
    name = f"{source.stem}-{capability.lower()}-{key}"
    try:
        compiler, version = _find_compiler()
    except KernelBuildError:
        if built := sorted(folder.glob(f"{name}-*.so")):
            return built[0]
        raise
    library = folder / f"{name}-{_digest(*compiler, version)}.so"
    if library.exists():
        return library
    if library in _failures:
        raise KernelBuildError(_failures[library])
    with FileLock(library.with_suffix(".lock"), mode=0o600):  # replicas of one machine start at the same time
        if not library.exists():
            logger.info("building the %s kernel for %s, once; takes up to half a minute", kind, capability)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                made = Path(temporary) / library.name
                try:
                    _compile([*compiler, *flags, str(source), *paths, "-o", str(made)])
                except KernelBuildError as error:
                    _failures[library] = error.message
                    raise
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
    return KernelBuildError(f"{command[0]} could not build the kernel: {reason[-2000:]}")
