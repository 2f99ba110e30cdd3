"""The queues of a device that a step uses, and the events between them.

They decide in which order asynchronous work happens. CUDA's are here; a test puts in a device that runs queued work in any
order that the events allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A place in a stream."""

    def synchronize(self) -> None:
        """Block this thread until the stream has come to this place."""
        ...

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from here to `end`, which the stream has come to; both are places that `mark` gave."""
        ...


class Stream(Protocol):
    """Work that is put in runs later, in order; beside the work of other streams, unless an event is waited for."""

    def run(self, launch: Callable[[], None]) -> None:
        """Put in what `launch` launches."""
        ...

    def record(self, gate: Event | None = None) -> Event:
        """The place behind all that was put in so far. gate: see `Streams.gate`; it is there from now on."""
        ...

    def mark(self) -> Event:
        """As `record`, with the time at which the stream comes there."""
        ...

    def wait(self, event: Event) -> None:
        """What is put in from now on runs after `event`."""
        ...


@dataclass(frozen=True, slots=True)
class Streams:
    """compute: what the model runs in. swap_in, swap_out: the copies of each direction.

    gate: makes an event that a recorded step may wait for: each replay waits for the place where it was recorded last.
    """

    compute: Stream
    swap_in: Stream
    swap_out: Stream
    gate: Callable[[], Event]


class CudaStream:
    """A stream of `device` of its own, or the one that is current when it is used."""

    def __init__(self, device: torch.device, *, is_current: bool = False) -> None:
        self._device = device
        # Of high priority: the kernels that convert cold blocks are small, and others wait for what they bring.
        self._stream = None if is_current else torch.cuda.Stream(device, priority=-1)

    def run(self, launch: Callable[[], None]) -> None:
        with torch.cuda.stream(self._get()):
            launch()

    def record(self, gate: Event | None = None) -> Event:
        event: Event = self._get().record_event(gate)
        return event

    def mark(self) -> Event:
        event: Event = self._get().record_event(torch.cuda.Event(enable_timing=True))
        return event

    def wait(self, event: Event) -> None:
        self._get().wait_event(event)

    def _get(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device)


def cuda_streams(device: torch.device) -> Streams:
    return Streams(
        CudaStream(device, is_current=True), CudaStream(device), CudaStream(device), partial(_make_gate, device)
    )


def _make_gate(device: torch.device) -> Event:
    """One that nothing waits for yet: CUDA makes an event when it is recorded for the first time."""
    gate: Event = torch.cuda.current_stream(device).record_event(torch.cuda.Event(external=True))
    return gate
