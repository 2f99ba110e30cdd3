"""An answer that is asked for in the background: no call waits, and a failure changes nothing."""

from __future__ import annotations

import asyncio

from deployments.cluster.refreshed import Refreshed


class Question:
    """Answers what is put in; an exception is raised."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[int | Exception] = asyncio.Queue()
        self.num_asked = 0

    async def __call__(self) -> int:
        self.num_asked += 1
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_calls_get_the_latest_answer_and_do_not_wait() -> None:
    question = Question()
    latest = Refreshed(question, 2, 0.0, (KeyError,))
    for before, answer, after in [(2, 4, 4), (4, KeyError("gone"), 4), (4, 1, 1)]:
        assert [latest(), latest()] == [before, before]  # asked once, and not waited for
        await settle()
        question.answers.put_nowait(answer)
        await settle()
        assert latest() == after
        await settle()
        question.answers.put_nowait(after)
        await settle()
    assert question.num_asked == 6


async def test_it_is_not_asked_at_every_call() -> None:
    question = Question()
    latest = Refreshed(question, 1, 3600.0, ())
    question.answers.put_nowait(3)
    for _ in range(10):
        latest()
        await settle()
    assert (latest(), question.num_asked) == (3, 1)
