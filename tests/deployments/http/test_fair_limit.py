"""Who gets more when as much is held as may be."""

from __future__ import annotations

import random

from deployments.http.fair_limit import FairLimit


def test_one_tenant_gets_the_whole_and_no_more() -> None:
    limit = FairLimit()
    assert [limit.try_take("a", 1, 3) for _ in range(4)] == [True, True, True, False]
    limit.give_back("a", 1)
    assert [limit.try_take("a", 1, 3) for _ in range(2)] == [True, False]


def test_all_of_an_amount_or_nothing() -> None:
    limit = FairLimit()
    assert limit.try_take("a", 60, 100)
    assert not limit.try_take("a", 41, 100)
    assert limit.try_take("a", 40, 100)


def test_above_the_limit_each_tenant_gets_its_equal_part() -> None:
    limit = FairLimit()
    assert all(limit.try_take("a", 1, 12) for _ in range(12))
    assert [limit.try_take("b", 1, 12) for _ in range(7)] == [True] * 6 + [False]
    assert [limit.try_take("c", 1, 12) for _ in range(5)] == [True] * 4 + [False]
    assert not limit.try_take("a", 1, 12)


def test_what_is_held_is_bounded_whatever_happens() -> None:
    rng = random.Random(0)
    limit, held = FairLimit(), [(tenant, 0) for tenant in ()]
    for _ in range(5000):
        if held and rng.random() < 0.4:
            limit.give_back(*held.pop(rng.randrange(len(held))))
        else:
            taken = rng.choice("abcdef"), rng.randint(1, 4)
            if limit.try_take(*taken, 50):
                held.append(taken)
        total = sum(amount for _, amount in held)
        assert total <= 100
        if len({tenant for tenant, _ in held}) == 1:
            assert total <= 50 or not limit.try_take(held[0][0], 1, 50)
    for taken in held:
        limit.give_back(*taken)
    assert limit.try_take("z", 50, 50)
    assert not limit.try_take("z", 1, 50)
