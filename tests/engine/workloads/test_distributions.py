"""Named distributions: their notation, their means, and what is refused."""

from __future__ import annotations

import random
import statistics

import pytest

from engine.errors import WorkloadError
from engine.workloads.distributions import (
    Constant,
    Exponential,
    Geometric,
    Lognormal,
    Pareto,
    Uniform,
    parse_distribution,
    sample_count,
)


@pytest.mark.parametrize(
    ("value", "distribution"),
    [
        (3, Constant(3.0)),
        ("204.6", Constant(204.6)),
        ("constant:value=2", Constant(2.0)),
        ("exponential:mean=60", Exponential(60.0)),
        ("lognormal:mean=200,sigma=1,max=2048", Lognormal(200.0, 1.0, 2048.0)),
        ("uniform:min=1, max=3", Uniform(1.0, 3.0)),
        ({"distribution": "geometric", "mean": 5.5}, Geometric(5.5)),
        ("pareto:min=10,alpha=2", Pareto(10.0, 2.0)),
    ],
)
def test_a_distribution_is_named_with_its_parameters(value: object, distribution: object) -> None:
    assert parse_distribution(value) == distribution  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("normal:mean=3", "unknown distribution 'normal'; give a number, or one of constant, uniform"),
        ("exponential", r"needs mean; write exponential:mean=X,\[max=X\]"),
        ("exponential:average=3", "has no average; write"),
        ("lognormal:mean=0,sigma=1", "needs a mean above 0"),
        ("uniform:min=3,max=1", "its min above its max"),
        ("constant:value=-1", "not below 0"),
        ("exponential:mean=nan", "mean must be a number"),
        ({"distribution": "constant", "value": True}, "value must be a number, got True"),
    ],
)
def test_what_is_no_distribution_is_refused(value: object, problem: str) -> None:
    with pytest.raises(WorkloadError, match=problem):
        parse_distribution(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "mean"),
    [
        ("uniform:min=10,max=30", 20),
        ("exponential:mean=60", 60),
        ("lognormal:mean=204.58,sigma=1", 204.58),
        ("geometric:mean=5.56", 5.56),
        ("geometric:mean=1", 1),
        ("pareto:min=10,alpha=3", 15),
    ],
)
def test_the_mean_is_that_of_the_numbers_drawn(text: str, mean: float) -> None:
    rng = random.Random(0)
    distribution = parse_distribution(text)
    assert statistics.fmean(distribution.sample(rng) for _ in range(40_000)) == pytest.approx(mean, rel=0.03)


def test_a_max_cuts_what_is_drawn() -> None:
    rng = random.Random(0)
    for text in ("exponential:mean=60,max=5", "lognormal:mean=60,sigma=1,max=5", "geometric:mean=60,max=5"):
        drawn = [parse_distribution(text).sample(rng) for _ in range(200)]
        assert max(drawn) == 5


def test_a_count_is_at_least_one() -> None:
    rng = random.Random(0)
    assert sample_count(Constant(0.2), rng) == 1
    assert sample_count(Constant(2.6), rng) == 3
