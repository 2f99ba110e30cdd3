"""Chooses the implementation of paged attention and says in the log which one is active."""

from __future__ import annotations

import logging

import torch

from engine.attention import cpu, reference
from engine.attention.metadata import AttentionBackend
from engine.errors import ConfigError, KernelBuildError

logger = logging.getLogger(__name__)


def choose_backend(option: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend of the option `attention_backend`. Raises ConfigError where it was asked for by name and cannot run."""
    if option == "cpu" and device.type != "cpu":
        raise ConfigError(
            f"attention_backend is 'cpu', but the model is on {device}; use 'auto'", param="attention_backend"
        )
    if option == "reference" or device.type != "cpu" or dtype not in cpu.DTYPES:
        logger.info("attention: torch's operations (reference)")
        return reference
    try:
        capability = cpu.load_kernel()
    except KernelBuildError as error:
        if option == "cpu":
            raise ConfigError(f"attention_backend is 'cpu', but {error.message}", param="attention_backend") from error
        logger.warning("attention: torch's operations (reference), several times slower than the C++ kernel; %s", error)
        return reference
    logger.info("attention: C++ kernel (cpu), %s", capability)
    return cpu
