"""The choices of one request: each is a generation of its own, and some run concurrently.

Choice `p * n + i` is the i-th answer to prompt p. The first answer to a prompt begins alone; the others, its forks, start
when its first delta is there, because then they find the prompt in the cache. Knows no wire format.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from contextvars import Context
from dataclasses import replace
from typing import NamedTuple

from deployments.generation import ErrorItem, GenerationItem, GenerationRequest, drain

Items = AsyncGenerator[GenerationItem, None]


class ChoiceItem(NamedTuple):
    """What came of a choice."""

    choice: int
    item: GenerationItem


async def generate_choices(
    prompts: Sequence[GenerationRequest],
    n: int,
    generate: Callable[[GenerationRequest], Items],
    *,
    max_running: int,
    num_places: Callable[[], float],
) -> AsyncGenerator[ChoiceItem, None]:
    """The items of all choices as they come; those of one choice are in order. An ErrorItem of any is the last one.

    Closing this closes all of them.

    prompts: the first generation of each prompt.
    max_running: choices at the same time, at least 1.
    num_places: how many more may start now; if none may, and none runs, one starts all the same.
    """
    if len(prompts) == n == 1:
        async with aclosing(generate(prompts[0])) as items:
            async for only in items:
                if isinstance(only, ErrorItem):
                    await drain(items)
                yield ChoiceItem(0, only)
        return
    waiting = deque((number * n, prompt) for number, prompt in enumerate(prompts))
    forked: set[int] = set()
    running: dict[asyncio.Task[GenerationItem | None], tuple[int, Items]] = {}
    try:
        while waiting or running:
            room = min(max_running - len(running), max(num_places(), not running))
            while waiting and room > 0:
                index, request = waiting.popleft()
                # A whole answer would say too late that its prompt has been computed.
                items = generate(replace(request, stream=True) if n > 1 and index % n == 0 else request)
                running[_next(items)] = index, items
                room -= 1
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: running[task][0]):
                index, items = running.pop(task)
                item = task.result()
                if item is None:
                    continue
                if isinstance(item, ErrorItem):
                    await drain(items)  # it is about to end
                    yield ChoiceItem(index, item)
                    return
                running[_next(items)] = index, items
                if index % n == 0 and index not in forked:
                    forked.add(index)
                    forks = ((index + i, _fork(prompts[index // n], i)) for i in reversed(range(1, n)))
                    waiting.extendleft(forks)
                yield ChoiceItem(index, item)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for _, items in running.values():
            await items.aclose()


def _next(items: Items) -> asyncio.Task[GenerationItem | None]:
    """In an empty context: by what is in the request's, Ray Serve takes two calls for one if they are routed concurrently."""

    async def next_item() -> GenerationItem | None:
        return await anext(items, None)

    return asyncio.create_task(next_item(), context=Context())


def _fork(request: GenerationRequest, number: int) -> GenerationRequest:
    """Another answer to the same prompt, of which all is told by the first. Without a seed, each draws its own."""
    sampling = replace(request.sampling, prompt_logprobs=None)
    if sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + number + 2**63) % 2**64 - 2**63)
    return replace(request, request_id=f"{request.request_id}.{number}", sampling=sampling, return_prompt_text=False)
