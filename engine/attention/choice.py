"""Chooses the attention backend of a model on this machine, and logs which one is active and why."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.attention import reference, trial
from engine.attention.device_clock import SecondsOf, seconds_on
from engine.attention.device_health import check_device
from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionLoader
from engine.attention.registry import BACKENDS, BackendRow
from engine.attention.self_check import find_fault
from engine.errors import ConfigError, KernelBuildError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """What a backend has to serve, and on what."""

    device: torch.device
    dtype: torch.dtype
    calls: Sequence[AttentionCall]
    chunk_size: int


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    row: BackendRow
    backend: AttentionBackend
    description: str


def choose_backend(
    option: str,
    device: torch.device,
    dtype: torch.dtype,
    calls: Sequence[AttentionCall] = (),
    chunk_size: int = 0,
    seconds_of: SecondsOf | None = None,
) -> AttentionBackend:
    """Return the backend of the option `attention_backend`, checked against the reference for this model.

    option: "auto" or a name of the registry.
    calls: the model's attention calls; none = nothing is checked or measured.
    chunk_size: tokens of a block.
    seconds_of: times the trial of `auto`; None = by the clock.
    Raises ConfigError if a backend that was asked for by name cannot run here, or computes something wrong.
    """
    place = _Place(device, dtype, calls, chunk_size)
    rows = [row for row in BACKENDS if _is_candidate(row, option, device)]
    try:
        loaded = (
            _load(rows[0], place) if rows else _Loaded(BACKENDS[-1], *reference.load(device, dtype, calls, chunk_size))
        )
        if len(rows) > 1 and calls:
            loaded = _fastest(loaded, rows[1:], place, seconds_of)
        if device.type in loaded.row.devices:  # not Triton's interpreter, which takes minutes
            fault = find_fault(loaded.backend, device, dtype, calls, chunk_size)
            if fault is not None:
                raise KernelBuildError(f"{loaded.description}, is wrong here for this model in {dtype}: {fault}")
    except KernelBuildError as error:
        if option != "auto":
            raise ConfigError(
                f"attention_backend is {option!r}, but {error.message}", param="attention_backend"
            ) from error
        logger.warning("attention: torch's operations (reference), much slower than a kernel; %s", error)
        return reference
    logger.info("attention: %s", loaded.description)
    return loaded.backend


def _is_candidate(row: BackendRow, option: str, device: torch.device) -> bool:
    if option == "auto":
        return row.is_automatic and device.type in row.devices
    return row.name == option


def _load(row: BackendRow, place: _Place) -> _Loaded:
    """Raises KernelBuildError if the backend cannot serve such a model here."""
    try:
        loader: AttentionLoader = importlib.import_module(row.module)
    except ImportError as error:
        raise KernelBuildError(
            f"{row.name} cannot be imported ({error}); pip install 'pensieve-ray[gpu]', or use 'reference'"
        ) from error
    return _Loaded(row, *loader.load(place.device, place.dtype, place.calls, place.chunk_size))


def _fastest(first: _Loaded, others: Sequence[BackendRow], place: _Place, seconds_of: SecondsOf | None) -> _Loaded:
    """Return the fastest backend for the model; the first one if that cannot be measured.

    Raises nothing but DeviceFailedError: the engine can do without any of the others.
    """
    candidates = {first.row.name: first}
    for row in others:
        try:
            candidates[row.name] = _load(row, place)
        except KernelBuildError as error:
            logger.info("attention: auto does without %s: %s", row.name, error)
        except Exception as error:
            check_device(place.device)
            logger.warning("attention: auto does without %s: %r", row.name, error)
    if len(candidates) == 1:
        logger.info("attention: auto had nothing to measure: %s is the only one for this model here", first.row.name)
        return first
    backends = {name: loaded.backend for name, loaded in candidates.items()}
    trials = trial.make_trials(place.device, place.dtype, place.calls, place.chunk_size)
    try:
        seconds_of = seconds_of or seconds_on(place.device)
        return candidates[trial.choose_fastest(backends, trials, seconds_of, trial.TOLERANCE[place.dtype])]
    except Exception as error:
        check_device(place.device)
        logger.warning("attention: auto could not measure, and takes %s: %r", first.row.name, error)
        return first
    finally:
        torch.cuda.empty_cache()  # what the trial took
