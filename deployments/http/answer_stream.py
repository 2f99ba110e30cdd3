"""From the items of an answer to the events of its stream, in the same way for every endpoint.

How an event is worded is the endpoint's own; see AnswerFormat and TurnEvents.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

from deployments.generation import DeltaItem, ErrorItem, GenerationItem, drain
from engine.text.output import OutputDelta


class Items(Protocol):
    """The items of one answer. Closing them early cancels the call that gives them."""

    def __aiter__(self) -> AsyncIterator[GenerationItem]: ...

    async def __anext__(self) -> GenerationItem: ...

    async def aclose(self) -> None: ...


class EventFormat(Protocol):
    """How an endpoint words one stream; it may remember what was said before."""

    async def events(self, delta: OutputDelta) -> str:
        """What is new, as events, perhaps none. The delta with a finish_reason also gives the end of the stream."""
        ...

    async def error(self, error: ErrorItem) -> str:
        """The end of a stream that was begun and cannot go on."""
        ...


async def answer_events(first: DeltaItem, rest: Items, form: EventFormat) -> AsyncGenerator[str, None]:
    """All events of a stream that begins with `first`. Closing this closes `rest`."""
    async with aclosing(rest):
        item: GenerationItem = first
        while isinstance(item, DeltaItem):
            if events := await form.events(item.delta):
                yield events
            if item.delta.finish_reason is not None:
                break
            item = await anext(rest)
        else:
            yield await form.error(item)
        await drain(rest)
