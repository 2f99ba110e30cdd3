"""Which endpoints, at which loads, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.workloads.arrivals import Arrivals, ClosedLoop, Poisson, parse_arrivals
from engine.workloads.session import Session, Statistics

MAX_LEVELS, MAX_REPEATS = 100, 100


@dataclass(frozen=True, slots=True)
class Level:
    """One load. value: its number in a sweep, for plots; unit: of that."""

    label: str
    arrivals: Arrivals
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: an endpoint by its number, at a level by its number, for the n-th time."""

    endpoint: int
    level: int
    repeat: int

    @property
    def run_id(self) -> str:
        return f"{self.repeat}.{self.level}.{self.endpoint}"


def order_of(num_endpoints: int, num_levels: int, num_repeats: int) -> Iterator[Cell]:
    """All cells. Endpoints take turns at each level, and the first one changes, so that none is always first."""
    for repeat in range(num_repeats):
        for level in range(num_levels):
            for number in range(num_endpoints):
                yield Cell((number + repeat + level) % num_endpoints, level, repeat)


def levels_of(
    rates: Sequence[float], concurrencies: Sequence[int], arrivals: str | None, sessions: Sequence[Session]
) -> list[Level]:
    """One way to say the loads, or the default of 4 sessions at once. Raises ConfigError.

    rates: turns per second, which start as many sessions as have them on average.
    """
    if sum(map(bool, (rates, concurrencies, arrivals))) > 1:
        raise ConfigError(
            "--rate, --concurrency and --arrivals say the load in different ways; give one of them", param="rate"
        )
    if len(rates) + len(concurrencies) > MAX_LEVELS:
        raise ConfigError(f"a sweep has at most {MAX_LEVELS} loads", param="rate")
    if arrivals:
        return [Level(arrivals, parse_arrivals(arrivals), 0.0, "")]
    if rates:
        if min(rates) <= 0:
            raise ConfigError("--rate must be above 0 (turns per second)", param="rate")
        mean_turns = Statistics.of(sessions).mean_turns
        return [Level(f"{rate:g} turns/s", Poisson(rate / mean_turns), rate, "turns/s offered") for rate in rates]
    concurrencies = concurrencies or (4,)
    if min(concurrencies) < 1:
        raise ConfigError("--concurrency must be at least 1 (sessions at once)", param="concurrency")
    return [Level(f"{number} sessions", ClosedLoop(number), number, "sessions at once") for number in concurrencies]
