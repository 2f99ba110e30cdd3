"""Root-mean-square normalisations of a model, each by one call of the C++ kernel of rms_norm.cpp; on a CPU.

Written as transformers' models have it, one is eight operations of torch, each of which takes longer to begin than to
compute in a decode. Knows no model family: what a module computes is seen by trying it.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.errors import KernelBuildError
from engine.kernel_build import ISA_FLAGS, load_library

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("rms_norm.cpp")
DTYPES = (torch.float32, torch.bfloat16)
# How rows divided by their root mean square are scaled: rounded to the dtype first, then times the weight; times one plus the
# weight, in float32; times the weight, in float32.
SCALES = (0, 1, 2)
# Names of the attribute that modules add to the mean of squares.
EPSILONS = ("variance_epsilon", "eps")
# Of rows that a module is tried with: some are so small that what is added counts.
TRIED_SIZES = (1.0, 30.0, 1e-3)
# Most that an element may differ, in relation to the largest: float32 is added up in another order, and a bfloat16 may then
# be rounded the other way, which few are.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
MAX_SHARE_OF_OTHERS = {torch.float32: 1.0, torch.bfloat16: 0.02}


# (parent, name, module) of modules that were replaced.
Replaced = list[tuple[nn.Module, str, nn.Module]]


class RmsNorm(nn.Module):
    """One normalisation.

    weight: of the module that it stands for.
    scale: one of SCALES.
    kernel: the function of the library.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float, scale: int, kernel: Any) -> None:
        super().__init__()
        self.weight = weight
        self.eps = epsilon
        self.scale = scale
        self.kernel = kernel

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., length] -> the same. Raises ValueError for rows of another length or dtype than the weight's."""
        x = hidden_states.contiguous()
        length = len(self.weight)
        if x.shape[-1] != length or x.dtype != self.weight.dtype:
            raise ValueError(f"rows of {x.shape[-1]} {x.dtype} for a weight of {length} {self.weight.dtype}")
        out = torch.empty_like(x)
        self.kernel(
            x.dtype == torch.float32,
            self.scale,
            x.data_ptr(),
            self.weight.data_ptr(),
            out.data_ptr(),
            x.numel() // length,
            length,
            self.eps,
            torch.get_num_threads(),
        )
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> RmsNorm:
        return RmsNorm(nn.Parameter(self.weight.detach().clone(), False), self.eps, self.scale, self.kernel)


def replace_norms(model: nn.Module, dtype: torch.dtype) -> Replaced:
    """Replace the normalisations that the kernel computes as they do; return what stood where.

    Without a compiler they stay, with a line in the log.
    """
    found = [] if dtype not in DTYPES else list(_candidates(model, dtype))
    if not found:
        return []
    try:
        rms_norm = load_kernel()
    except KernelBuildError as error:
        logger.warning("normalisations are computed by torch's operations, which is slow for decodes; %s", error)
        return []
    replaced: Replaced = []
    for parent, name, module, epsilon in found:
        replacement = _replacement(module, epsilon, rms_norm)
        if replacement is not None:
            setattr(parent, name, replacement)
            replaced.append((parent, name, module))
    return replaced


def put_back(replaced: Replaced) -> None:
    """Undo `replace_norms`."""
    for parent, name, module in replaced:
        setattr(parent, name, module)


def _candidates(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Module, str, nn.Module, float]]:
    """(parent, name, module, epsilon) of modules with a vector of weights, an epsilon, rows to compute, and nothing else."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            tensors = [*module.named_parameters(), *module.named_buffers()]
            if [key for key, _ in tensors] != ["weight"] or next(module.children(), None) is not None:
                continue
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or len(inspect.signature(module.forward).parameters) != 1
            ):
                continue
            weight = tensors[0][1]
            epsilon = next((getattr(module, key) for key in EPSILONS if hasattr(module, key)), None)
            if (
                weight.dim() == 1
                and len(weight) > 1
                and weight.dtype == dtype
                and isinstance(epsilon, float)
                and weight.is_contiguous()
            ):
                yield parent, name, module, epsilon


@torch.inference_mode()
def _replacement(module: nn.Module, epsilon: float, rms_norm: Any) -> RmsNorm | None:
    """What computes the same as the module; None if nothing does."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(TRIED_SIZES), len(weight), generator=generator) * torch.tensor(TRIED_SIZES)[:, None]
    rows = rows.to(weight.dtype)
    try:
        expected = module(rows)
    except (RuntimeError, TypeError, ValueError):  # it wants something else beside rows
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != rows.shape or expected.dtype != rows.dtype:
        return None
    best: tuple[float, RmsNorm] | None = None
    for scale in SCALES:
        candidate = RmsNorm(weight, epsilon, scale, rms_norm)
        share = _share_of_others(candidate(rows), expected)
        if share is not None and (best is None or share < best[0]):
            best = share, candidate
    return None if best is None else best[1]


def _share_of_others(actual: torch.Tensor, expected: torch.Tensor) -> float | None:
    """The share of elements that differ at all; None if they differ by more than rounding."""
    largest = expected.float().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    error = (actual.float() - expected.float()).abs() / largest
    share = float((actual != expected).float().mean())
    is_same = bool((error <= TOLERANCE[expected.dtype]).all()) and share <= MAX_SHARE_OF_OTHERS[expected.dtype]
    return share if is_same else None


@functools.cache
def load_kernel() -> Any:
    """The function of the library, built unless that was done. Raises KernelBuildError."""
    capability: str = torch.backends.cpu.get_cpu_capability()
    # The compiler must not join two operations in one place and not in another.
    flags = ("-fopenmp", "-ffp-contract=off", *ISA_FLAGS.get(capability, ()))
    function = load_library(SOURCE, "normalisations", capability, flags).rms_norm
    addresses = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function.argtypes = (
        *(ctypes.c_int, ctypes.c_int, *addresses),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_float, ctypes.c_int),
    )
    function.restype = None
    return function
