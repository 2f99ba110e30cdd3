"""Streams that say something while there is nothing to tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from deployments.http.keep_alive import kept_alive


class Source:
    """Says `a` at once and `b` when it is let. ended: how it ended."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.ended = ""

    async def events(self) -> AsyncGenerator[str, None]:
        try:
            yield "a"
            await self.go.wait()
            yield "b"
            self.ended = "whole"
        finally:
            self.ended = self.ended or "early"


async def test_pings_stand_where_nothing_came() -> None:
    source, told = Source(), []
    async for event in kept_alive(source.events(), "ping", 0.0):
        told.append(event)
        if told[-2:] == ["ping", "ping"] and "a" in told:
            source.go.set()
    assert [event for event in told if event != "ping"] == ["a", "b"]
    assert "ping" in told[told.index("a") : told.index("b")]
    assert source.ended == "whole"


async def test_a_stream_that_is_never_silent_has_no_pings() -> None:
    source = Source()
    source.go.set()
    assert [event async for event in kept_alive(source.events(), "ping", 60.0)] == ["a", "b"]


async def test_leaving_early_ends_the_source() -> None:
    source = Source()
    async with aclosing(kept_alive(source.events(), "ping", 0.0)) as events:
        while await anext(events) != "a":
            pass
        assert await anext(events) == "ping"
    assert source.ended == "early"
    assert len(asyncio.all_tasks()) == 1  # nothing is left running


async def test_an_error_of_the_source_comes_through() -> None:
    async def events() -> AsyncGenerator[str, None]:
        yield "a"
        raise ValueError("b")

    stream = kept_alive(events(), "ping", 60.0)
    assert await anext(stream) == "a"
    with pytest.raises(ValueError, match="b"):
        await anext(stream)
