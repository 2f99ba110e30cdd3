"""Distributions by name: `204.6`, `exponential:mean=60`, `lognormal:mean=204.6,sigma=1,max=2048`.

Drawn by the standard library's generator, so that a seed gives the same numbers on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol

from engine.errors import WorkloadError


class Distribution(Protocol):
    """A frozen value that draws numbers."""

    def sample(self, rng: random.Random) -> float: ...


@dataclass(frozen=True, slots=True)
class Constant:
    """Always the same."""

    value: float

    def sample(self, rng: random.Random) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Uniform:
    """Between min and max."""

    min: float
    max: float

    def sample(self, rng: random.Random) -> float:
        return rng.uniform(self.min, self.max)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Memoryless, as the paper's think time."""

    POSITIVE: ClassVar = ("mean",)
    mean: float
    max: float = math.inf

    def sample(self, rng: random.Random) -> float:
        return min(self.max, rng.expovariate(1 / self.mean))


@dataclass(frozen=True, slots=True)
class Lognormal:
    """A long tail. mean: of the numbers themselves, before max cuts them. sigma: of their logarithms."""

    POSITIVE: ClassVar = ("mean",)
    mean: float
    sigma: float
    max: float = math.inf

    def sample(self, rng: random.Random) -> float:
        return min(self.max, rng.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma))


@dataclass(frozen=True, slots=True)
class Geometric:
    """1, 2, 3, ...: after each the same chance that it was the last."""

    POSITIVE: ClassVar = ("mean",)
    mean: float
    max: float = math.inf

    def sample(self, rng: random.Random) -> float:
        if self.mean <= 1:
            return 1.0
        return min(self.max, 1.0 + math.floor(math.log(1.0 - rng.random()) / math.log(1 - 1 / self.mean)))


@dataclass(frozen=True, slots=True)
class Pareto:
    """A heavy tail from min on. alpha: smaller is heavier; at most 1 has no mean."""

    POSITIVE: ClassVar = ("min", "alpha")
    min: float
    alpha: float
    max: float = math.inf

    def sample(self, rng: random.Random) -> float:
        return min(self.max, self.min * rng.paretovariate(self.alpha))


DISTRIBUTIONS: dict[str, type[Any]] = {
    "constant": Constant,
    "uniform": Uniform,
    "exponential": Exponential,
    "lognormal": Lognormal,
    "geometric": Geometric,
    "pareto": Pareto,
}


def sample_count(distribution: Distribution, rng: random.Random) -> int:
    """A number of things: rounded, at least 1."""
    return max(1, round(distribution.sample(rng)))


def parse_distribution(value: str | float | Mapping[str, Any]) -> Distribution:
    """From a number, from NAME:PARAMETER=X,..., or from a mapping with its name under `distribution`.

    Raises WorkloadError.
    """
    if isinstance(value, Mapping):
        parameters = dict(value)
        return _build(str(parameters.pop("distribution", "")), parameters)
    name, _, rest = str(value).partition(":")
    if not rest:
        try:
            return Constant(_number("value", name))
        except WorkloadError:
            return _build(name, {})
    return _build(name, dict(part.strip().partition("=")[::2] for part in rest.split(",")))


def _build(name: str, parameters: Mapping[str, Any]) -> Distribution:
    kind = DISTRIBUTIONS.get(name)
    if kind is None:
        raise WorkloadError(f"unknown distribution {name!r}; give a number, or one of {', '.join(DISTRIBUTIONS)}")
    wanted = {field.name: field.default is MISSING for field in fields(kind)}
    usage = f"{name}:{','.join(f'{each}=X' if needed else f'[{each}=X]' for each, needed in wanted.items())}"
    unknown = parameters.keys() - wanted.keys()
    missing = [each for each, needed in wanted.items() if needed and each not in parameters]
    if unknown or missing:
        what = f"has no {', '.join(sorted(unknown))}" if unknown else f"needs {', '.join(missing)}"
        raise WorkloadError(f"the distribution {name} {what}; write {usage}")
    values = {each: _number(each, value) for each, value in parameters.items()}
    for each in getattr(kind, "POSITIVE", ()):
        if not values[each] > 0:
            raise WorkloadError(f"the distribution {name} needs a {each} above 0, got {values[each]:g}")
    if values.get("min", -math.inf) > values.get("max", math.inf):
        raise WorkloadError(f"the distribution {name} has its min above its max; write {usage}")
    if any(value < 0 for value in values.values()):
        raise WorkloadError(f"the distribution {name} is of lengths, counts or seconds, which are not below 0")
    distribution: Distribution = kind(**values)
    return distribution


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise WorkloadError(f"{name} must be a number, got {value!r}")
    return number
