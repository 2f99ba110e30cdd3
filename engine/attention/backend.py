"""Chooses the implementation of paged attention and says in the log which one is active."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from engine.attention import cpu, reference
from engine.attention.metadata import AttentionBackend, LayerShape
from engine.errors import ConfigError, KernelBuildError

logger = logging.getLogger(__name__)


def choose_backend(
    option: str,
    device: torch.device,
    dtype: torch.dtype,
    layers: Sequence[LayerShape] = (),
    chunk_size: int = 0,
) -> AttentionBackend:
    """The backend of the option `attention_backend`, for a model with these layers and blocks of `chunk_size` tokens. Raises
    ConfigError where it was asked for by name and cannot run."""
    if option == "cpu" and device.type != "cpu":
        raise _config_error(f"attention_backend is 'cpu', but the model is on {device}; use 'auto'")
    name = option
    if option == "auto":
        name = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    try:
        if name == "triton":
            return _load_triton(device, dtype)
        if name == "varlen":
            return _load_varlen(device, dtype, layers, chunk_size)
        if name == "cpu" and dtype in cpu.DTYPES:
            logger.info("attention: C++ kernel (cpu), %s", cpu.load_kernel())
            return cpu
    except KernelBuildError as error:
        if option != "auto":
            raise _config_error(f"attention_backend is {option!r}, but {error.message}") from error
        logger.warning("attention: torch's operations (reference), much slower than a kernel; %s", error)
        return reference
    logger.info("attention: torch's operations (reference)")
    return reference


def _load_triton(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """Raises KernelBuildError where it cannot run."""
    try:
        from engine.attention import triton_paged  # not above: triton is optional
    except ImportError as error:
        raise KernelBuildError(
            f"triton cannot be imported ({error}); pip install 'pensieve-ray[gpu]', or use 'reference'"
        ) from error
    if device.type != "cuda" and not triton_paged.IS_INTERPRETED:
        raise KernelBuildError(
            f"the model is on {device} and not on a CUDA device; use 'auto', or, for a test of the kernel at a thousandth of "
            "its speed, set TRITON_INTERPRET=1 in the environment"
        )
    if dtype not in triton_paged.DTYPES:
        raise KernelBuildError(f"its kernel does not compute in {dtype}; use 'reference'")
    logger.info("attention: Triton kernel (triton), %s", triton_paged.load_kernel(device))
    return triton_paged


def _load_varlen(
    device: torch.device, dtype: torch.dtype, layers: Sequence[LayerShape], chunk_size: int
) -> AttentionBackend:
    """Raises KernelBuildError where it cannot run."""
    _load_triton(device, dtype)  # for what the other cannot
    from engine.attention import varlen

    if dtype not in varlen.DTYPES:
        raise KernelBuildError(f"FlashAttention does not compute in {dtype}; use 'triton'")
    logger.info("attention: FlashAttention (varlen), %s", varlen.load_kernel(device, layers, chunk_size))
    return varlen


def _config_error(message: str) -> ConfigError:
    return ConfigError(message, param="attention_backend")
