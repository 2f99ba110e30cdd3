"""Builds a C++ source of torch operators as a library for torch.ops.load_library; see kernel_build.py."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.kernel_build import ISA_FLAGS, build_library


def build_operators(source: Path, kind: str, capability: str) -> Path:
    """The library for this source, torch, processor and compiler; built unless it is there.

    kind: of kernel, for people.
    capability: the instruction set, as torch names it.

    Raises KernelBuildError, or OSError if the cache folder cannot be used.
    """
    torch_folder = Path(torch.__file__).parent
    # What ATen's Vectorized needs to be told.
    defines = (f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}") if capability in ISA_FLAGS else ()
    flags = ("-fopenmp", "-DAT_PARALLEL_OPENMP=1", *ISA_FLAGS.get(capability, ()), *defines)
    paths = (
        *(f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    )
    made_with = (torch.__version__, str(torch.version.git_version))
    return build_library(source, kind, capability, flags, paths, made_with)
