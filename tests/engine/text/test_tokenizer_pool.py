"""Work that waits for its thread: whose turn it is, how many may wait, and what becomes of it if its caller leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from engine.errors import EngineStoppedError, OverloadedError
from engine.tenant import Tenant
from engine.text.tokenizer_pool import LONG_CHARS, TokenizerPool

A, B = Tenant("a"), Tenant("b")


class Work:
    """Names in the order in which they were run; the first one waits until it is let go."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.go = threading.Event()
        self.has_begun = threading.Event()

    def named(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.has_begun.set()
            assert self.go.wait(60)
            self.done.append(name)
            return name

        return work


@pytest.fixture
async def pool() -> AsyncIterator[TokenizerPool]:
    pool = TokenizerPool(max_num_waiting=7)
    yield pool
    await asyncio.to_thread(pool.shutdown)


async def begin(pool: TokenizerPool, work: Work, *names: str, num_chars: int = 10) -> list[asyncio.Task[str]]:
    """One after the other; a name begins with its tenant's. The first one runs."""
    tasks = []
    for name in names:
        tasks.append(asyncio.create_task(pool.run(work.named(name), Tenant(name[0]), num_chars)))
        await asyncio.sleep(0)
        await asyncio.to_thread(work.has_begun.wait, 60)
    return tasks


async def test_the_result_or_the_error_is_that_of_the_work(pool):
    assert await pool.run(lambda: threading.current_thread().name, A, 10) == "tokenizer"
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 // 0, A, 10)
    assert await pool.run(lambda: threading.current_thread().name, A, LONG_CHARS + 1) == "tokenizer-long"


async def test_tenants_take_turns(pool):
    """One that came with much waits behind each of the others' once only."""
    work = Work()
    tasks = await begin(pool, work, "a0", "a1", "a2", "a3", "b1", "b2")
    work.go.set()
    await asyncio.gather(*tasks)
    assert work.done == ["a0", "b1", "a1", "b2", "a2", "a3"]


async def test_turns_are_by_characters_and_weight(pool):
    """b's piece is as long as three of a's, for which a tenant of three times the weight is charged a third."""
    work = Work()
    tasks = await begin(pool, work, "a0", "a1", "a2", "a3")
    for tenant, name in ((B, "b1"), (Tenant("c", 3.0), "c1"), (B, "b2"), (Tenant("c", 3.0), "c2")):
        tasks.append(asyncio.create_task(pool.run(work.named(name), tenant, 30)))
        await asyncio.sleep(0)
    work.go.set()
    await asyncio.gather(*tasks)
    assert work.done == ["a0", "b1", "c1", "a1", "c2", "a2", "a3", "b2"]


async def test_long_work_does_not_keep_the_rest_waiting(pool):
    work = Work()
    tasks = await begin(pool, work, "a0", "a1", num_chars=LONG_CHARS + 1)
    assert await pool.run(lambda: "short", A, LONG_CHARS) == "short"
    work.go.set()
    assert await asyncio.gather(*tasks) == ["a0", "a1"]


async def test_what_nobody_waits_for_any_more_is_not_run_and_takes_no_place(pool):
    work = Work()
    tasks = await begin(pool, work, "a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7")
    with pytest.raises(OverloadedError, match="7 prompts wait to be tokenised"):
        await pool.run(work.named("a8"), A, 10)
    for task in tasks[2:5]:
        task.cancel()
    await asyncio.wait(tasks[2:5])
    tasks += await begin(pool, work, "a9")
    work.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert work.done == ["a0", "a1", "a5", "a6", "a7", "a9"]
    assert [isinstance(result, asyncio.CancelledError) for result in results[2:5]] == [True] * 3


async def test_a_full_queue_gives_way_to_a_tenant_with_less_than_its_share(pool):
    work = Work()
    tasks = await begin(pool, work, "a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7")
    tasks += await begin(pool, work, "b1")
    with pytest.raises(OverloadedError, match="this tenant exceeds its share"):
        await tasks[7]
    work.go.set()
    await asyncio.gather(*tasks[:7], tasks[8])
    assert sorted(work.done) == ["a0", "a1", "a2", "a3", "a4", "a5", "a6", "b1"]


async def test_work_whose_caller_left_while_it_ran_harms_nothing(pool):
    work = Work()
    (task,) = await begin(pool, work, "a0")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    work.go.set()
    assert await pool.run(work.named("a1"), A, 10) == "a1"


async def test_a_shutdown_ends_what_waits_and_lets_end_what_runs(pool):
    work = Work()
    tasks = await begin(pool, work, "a0", "a1", "b1")
    stopping = asyncio.create_task(asyncio.to_thread(pool.shutdown))
    for task in tasks[1:]:
        with pytest.raises(EngineStoppedError):
            await task
    work.go.set()
    assert await tasks[0] == "a0"
    await stopping
    with pytest.raises(EngineStoppedError):
        await pool.run(work.named("a2"), A, 10)
    assert not any(thread.name.startswith("tokenizer") for thread in threading.enumerate())


async def test_callers_of_two_event_loops_are_served(pool):
    assert await asyncio.to_thread(lambda: asyncio.run(pool.run(lambda: "there", A, 10))) == "there"
    assert await pool.run(lambda: "here", B, 10) == "here"
