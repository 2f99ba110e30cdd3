"""Chooses the implementation of paged attention and says in the log which one is active."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from engine.attention import choice, cpu, reference
from engine.attention.device_clock import SecondsOf, seconds_on
from engine.attention.device_health import check_device
from engine.attention.metadata import AttentionBackend, AttentionCall
from engine.attention.self_check import find_fault
from engine.errors import ConfigError, KernelBuildError

logger = logging.getLogger(__name__)

# A backend, and what the log says of it.
_Loaded = tuple[AttentionBackend, str]


def choose_backend(
    option: str,
    device: torch.device,
    dtype: torch.dtype,
    calls: Sequence[AttentionCall] = (),
    chunk_size: int = 0,
    seconds_of: SecondsOf | None = None,
) -> AttentionBackend:
    """The backend of the option `attention_backend`, which has shown that it is right for the model on this machine.

    calls: the model's attention calls; none = nothing is tried. chunk_size: tokens of a block. seconds_of: times the trial of
    `auto`; None = by the clock. Raises ConfigError if a backend was asked for by name and cannot run, or is wrong.
    """
    if option == "cpu" and device.type != "cpu":
        raise _config_error(f"attention_backend is 'cpu', but the model is on {device}; use 'auto'")
    name = option
    if option == "auto":
        name = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    try:
        backend, description = _load(name, option, device, dtype, calls, chunk_size, seconds_of)
        if backend is cpu or device.type == "cuda":  # not Triton's interpreter, which takes minutes
            fault = find_fault(backend, device, dtype, calls, chunk_size)
            if fault is not None:
                raise KernelBuildError(f"{description}, is wrong here for this model in {dtype}: {fault}")
    except KernelBuildError as error:
        if option != "auto":
            raise _config_error(f"attention_backend is {option!r}, but {error.message}") from error
        logger.warning("attention: torch's operations (reference), much slower than a kernel; %s", error)
        return reference
    logger.info("attention: %s", description)
    return backend


def _load(
    name: str,
    option: str,
    device: torch.device,
    dtype: torch.dtype,
    calls: Sequence[AttentionCall],
    chunk_size: int,
    seconds_of: SecondsOf | None,
) -> _Loaded:
    """Raises KernelBuildError if it cannot be loaded here."""
    if name in _LOADERS:
        loaded = _LOADERS[name](device, dtype, calls, chunk_size)
        if option == "auto" and calls:
            loaded = _fastest(loaded, device, dtype, calls, chunk_size, seconds_of)
            torch.cuda.empty_cache()  # what the trial took
        return loaded
    if name == "cpu" and dtype in cpu.DTYPES:
        return cpu, f"C++ kernel (cpu), {cpu.load_kernel()}"
    return reference, "torch's operations (reference)"


def _fastest(
    triton: _Loaded,
    device: torch.device,
    dtype: torch.dtype,
    calls: Sequence[AttentionCall],
    chunk_size: int,
    seconds_of: SecondsOf | None,
) -> _Loaded:
    """Of all that can serve the model on this CUDA device; Triton's kernel where that cannot be told. Raises nothing: the
    engine can do without any of the others."""
    candidates = {"triton": triton}
    for name, load in _LOADERS.items():
        if name == "triton":
            continue
        try:
            candidates[name] = load(device, dtype, calls, chunk_size)
        except KernelBuildError as error:
            logger.info("attention: auto does without %s: %s", name, error)
        except Exception as error:
            check_device(device)
            logger.warning("attention: auto does without %s: %r", name, error)
    if len(candidates) == 1:
        logger.info("attention: auto had nothing to measure: triton is the only one for this model here")
        return triton
    backends = {name: backend for name, (backend, _) in candidates.items()}
    trials = choice.make_trials(device, dtype, calls, chunk_size)
    try:
        seconds_of = seconds_of or seconds_on(device)
        return candidates[choice.choose_fastest(backends, trials, seconds_of, choice.TOLERANCE[dtype])]
    except Exception as error:
        check_device(device)
        logger.warning("attention: auto could not measure, and takes triton: %r", error)
        return triton


def _load_triton(
    device: torch.device, dtype: torch.dtype, calls: Sequence[AttentionCall] = (), chunk_size: int = 0
) -> _Loaded:
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
    return triton_paged, f"Triton kernel (triton), {triton_paged.load_kernel(device)}"


def _load_flashinfer(
    device: torch.device, dtype: torch.dtype, calls: Sequence[AttentionCall], chunk_size: int
) -> _Loaded:
    _load_triton(device, dtype)  # for what the other cannot
    from engine.attention import flashinfer_paged

    version = flashinfer_paged.load_kernel(device, calls, chunk_size, dtype)
    return flashinfer_paged.FlashInferAttention(), f"FlashInfer (flashinfer), {version}"


# Each raises KernelBuildError where it cannot serve such a model here.
_LOADERS: dict[str, Callable[[torch.device, torch.dtype, Sequence[AttentionCall], int], _Loaded]] = {
    "triton": _load_triton,
    "flashinfer": _load_flashinfer,
}


def _config_error(message: str) -> ConfigError:
    return ConfigError(message, param="attention_backend")
