"""When sessions start: `closed:8`, `poisson:0.5`, `ramp:0.1:2:60`, `ramp:0.1:2:60:0.1:60`, `trace`, `trace:0.5`.

The turns after the first follow the answers, whatever the arrivals: a slow turn delays the next.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from engine.errors import WorkloadError
from engine.workloads.session import Session, Turn

USAGE = (
    "closed:SESSIONS, poisson:SESSIONS_PER_SECOND, ramp:FROM:TO:SECONDS[:TO:SECONDS...] (in sessions per "
    "second), trace or trace:FACTOR"
)


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many sessions are under way at any time: the next begins as one ends. The driver sees to that; start times are 0."""

    num_active: int


@dataclass(frozen=True, slots=True)
class Poisson:
    """At random, so many a second on average."""

    sessions_per_s: float

    def time_of(self, num_expected: float) -> float:
        """When so many sessions are expected to have started."""
        return num_expected / self.sessions_per_s


@dataclass(frozen=True, slots=True)
class Ramp:
    """At random, at a rate that goes from one to another in so many seconds, and on with `then`, or stays there."""

    from_per_s: float
    to_per_s: float
    seconds: float
    then: Ramp | None = None

    @property
    def most_per_s(self) -> float:
        """The highest rate."""
        return max(self.from_per_s, self.to_per_s, 0.0 if self.then is None else self.then.most_per_s)

    def times(self, factor: float) -> Ramp:
        """All rates multiplied."""
        then = None if self.then is None else self.then.times(factor)
        return Ramp(self.from_per_s * factor, self.to_per_s * factor, self.seconds, then)

    def time_of(self, num_expected: float) -> float:
        """When so many sessions are expected to have started: the inverse of the integral of the rate."""
        slope = (self.to_per_s - self.from_per_s) / self.seconds
        within = (self.from_per_s + self.to_per_s) / 2 * self.seconds
        if num_expected > within and self.then is not None:
            return self.seconds + self.then.time_of(num_expected - within)
        if num_expected > within:
            return self.seconds + (num_expected - within) / self.to_per_s
        # from * t + slope * t^2 / 2 = num_expected, in a form that divides by nothing small
        root = math.sqrt(max(0.0, self.from_per_s**2 + 2 * slope * num_expected))
        return 2 * num_expected / (self.from_per_s + root) if num_expected else 0.0


@dataclass(frozen=True, slots=True)
class TraceTime:
    """When the trace says, and with its pauses, all times multiplied by `factor`: 0.5 is twice as fast."""

    factor: float = 1.0


Arrivals = ClosedLoop | Poisson | Ramp | TraceTime


def arrange(sessions: Iterable[Session], arrivals: Arrivals, seed: int = 0) -> Iterator[Session]:
    """The sessions with their start times, in order of these. Pauses are scaled by TraceTime only."""
    if isinstance(arrivals, TraceTime):
        scaled = (_scaled(session, arrivals.factor) for session in sessions)
        yield from sorted(scaled, key=lambda session: session.start_s)
        return
    rng = random.Random(f"arrivals.{seed}")
    num_expected = 0.0
    for session in sessions:
        if isinstance(arrivals, ClosedLoop):
            yield replace(session, start_s=0.0)
            continue
        num_expected += rng.expovariate(1.0)
        yield replace(session, start_s=arrivals.time_of(num_expected))


def parse_arrivals(text: str) -> Arrivals:
    """See the module. Raises WorkloadError."""
    name, *values = text.split(":")
    try:
        numbers = [float(value) for value in values]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError
        match name, numbers:
            case "closed", [num_active] if num_active >= 1 and num_active == int(num_active):
                return ClosedLoop(int(num_active))
            case "poisson", [rate] if rate > 0:
                return Poisson(rate)
            case "ramp", [first, *parts] if parts:
                return _ramp(first, parts)
            case "trace", []:
                return TraceTime()
            case "trace", [factor]:
                return TraceTime(factor)
    except ValueError:
        pass
    raise WorkloadError(f"unknown arrivals {text!r}; write {USAGE}")


def _ramp(first: float, parts: Sequence[float]) -> Ramp:
    """parts: a rate and the seconds until it is reached, in turns. Raises ValueError."""
    last, seconds, *rest = parts
    if seconds <= 0 or (last <= 0 and not rest):  # sessions have to start at some time
        raise ValueError
    return Ramp(first, last, seconds, _ramp(last, rest) if rest else None)


def _scaled(session: Session, factor: float) -> Session:
    if factor == 1.0:
        return session
    return replace(
        session, start_s=session.start_s * factor, turns=tuple(_faster(turn, factor) for turn in session.turns)
    )


def _faster(turn: Turn, factor: float) -> Turn:
    return replace(turn, pause_s=turn.pause_s * factor)
