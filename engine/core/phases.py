"""Where the time of one request went: its phases, from its arrival to its end.

A request is in one phase at any time, so that the times add up to the whole. Knows no request and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

# The spans that are kept of one request. It may be preempted again and again; its totals are exact all the same.
MAX_SPANS = 32


class Phase(StrEnum):
    """What a request does, or waits for.

    QUEUE: its first turn. LOAD: what is being loaded for it from slow tiers. PREFILL: it runs and has no token yet.
    DECODE: it runs and has one. SUSPENDED: it was preempted and waits to go on.
    """

    QUEUE = "queue"
    LOAD = "load"
    PREFILL = "prefill"
    DECODE = "decode"
    SUSPENDED = "suspended"


class PhaseSpan(NamedTuple):
    """A phase from when to when, in seconds of the driver's clock."""

    phase: Phase
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPhases:
    """The time that a request spent in each phase, in seconds; together, the time from its arrival to its end.

    spans: the first MAX_SPANS of them, in order; one begins when the one before it ends.
    """

    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    suspended_s: float = 0.0
    spans: tuple[PhaseSpan, ...] = ()


class PhaseTimeline:
    """The phases of one request as it goes through them."""

    __slots__ = ("_phase", "_since_s", "_spans", "_totals")

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._since_s = 0.0
        self._totals = dict.fromkeys(Phase, 0.0)
        self._spans: list[PhaseSpan] = []

    def enter(self, phase: Phase, now: float) -> None:
        """It is in this phase from now on; the same one again changes nothing."""
        if phase is not self._phase:
            self._close(now)
            self._phase, self._since_s = phase, now

    def end(self, now: float) -> RequestPhases:
        """The whole of it. May be called again, with the same result: the first end counts."""
        self._close(now)
        self._phase = None
        times = {f"{phase.value}_s": seconds for phase, seconds in self._totals.items()}
        return RequestPhases(**times, spans=tuple(self._spans))

    def _close(self, now: float) -> None:
        if self._phase is None:
            return
        self._totals[self._phase] += now - self._since_s
        if len(self._spans) < MAX_SPANS:
            self._spans.append(PhaseSpan(self._phase, self._since_s, now))
