"""Seconds of what a GPU does, without the time to launch it if that can be recorded.

In the smoke run, of a CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from engine.attention.device_health import check_device

Call = Callable[[], object]
# Calls in one recorded graph: what starting it takes is shared by them.
INNER = 10
# Of the device, while the host puts a call into its queue: a quarter of a millisecond.
LAUNCHING_CYCLES = 500_000


def measure(calls: dict[str, Call], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each call, taken in turns.

    What raises is left out, unless it has broken the device: that raises DeviceFailedError.
    """
    runs: dict[str, tuple[Call, int]] = {}
    for name, call in calls.items():
        try:
            call()
            runs[name] = _recorded(call) if device.type == "cuda" else (call, 1)
        except (RuntimeError, NotImplementedError) as error:
            check_device(device)
            print(f"  {name}: {str(error).strip().splitlines()[0]}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, (run, num_calls) in runs.items():
            seconds[name].append(timed(run, device) / num_calls)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def timed(call: Call, device: torch.device) -> float:
    """Seconds of the device, once."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LAUNCHING_CYCLES)  # type: ignore[no-untyped-call]  # all is in the queue before the first of it begins
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def first_call(call: Call, device: torch.device) -> float:
    """Seconds of one call, and of the device behind it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def wall(call: Call, repeats: int) -> float:
    """Median seconds of a call that waits for the device itself, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


@contextmanager
def seconds_of(owner: object, *names: str) -> Iterator[dict[str, list[float]]]:
    """Seconds of each call of these methods of `owner`, by name, as long as the context lasts."""
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def timed_call(name: str) -> Callable[..., Any]:
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = method(*args, **kwargs)
            seconds[name].append(time.perf_counter() - begin)
            return result

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(owner, name, timed_call(name)))
        yield seconds


def _recorded(call: Call) -> tuple[Call, int]:
    """A CUDA graph of several calls, and how many; the call itself where it cannot be recorded."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for _ in range(INNER):
                call()
    except RuntimeError:
        torch.cuda.set_stream(current)
        check_device(current.device)
        return call, 1
    return _Replay(graph, call), INNER


class _Replay:
    """A recorded call, with the call: what it reads has to live as long as the graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, call: Call) -> None:
        self._graph = graph
        self._call = call

    def __call__(self) -> None:
        self._graph.replay()
