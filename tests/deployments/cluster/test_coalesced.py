"""One question for all who ask at about the same time."""

from __future__ import annotations

import asyncio

import pytest

from deployments.cluster.coalesced import Coalesced


class Question:
    def __init__(self) -> None:
        self.num_asked = 0
        self.error: Exception | None = None
        self.now = 100.0

    async def __call__(self) -> None:
        self.num_asked += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


async def test_an_answer_is_good_for_a_period() -> None:
    question = Question()
    ask = Coalesced(question, 1.0, lambda: question.now)
    await asyncio.gather(*(ask() for _ in range(100)))
    question.now += 0.9
    await ask()
    assert question.num_asked == 1
    question.now += 0.2
    await asyncio.gather(*(ask() for _ in range(100)))
    assert question.num_asked == 2


async def test_a_failure_is_everybodys_too_and_is_not_kept() -> None:
    question = Question()
    question.error = ValueError("down")
    ask = Coalesced(question, 1.0, lambda: question.now)
    outcomes = await asyncio.gather(*(ask() for _ in range(10)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["down"] * 10
    question.error = None
    with pytest.raises(ValueError, match="down"):
        await ask()
    question.now += 1.0
    await ask()
    assert question.num_asked == 2


async def test_who_gives_up_takes_nothing_from_the_others() -> None:
    question = Question()
    ask = Coalesced(question, 1.0, lambda: question.now)
    first, second = asyncio.create_task(ask()), asyncio.create_task(ask())
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert question.num_asked == 1
