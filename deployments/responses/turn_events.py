"""The events of a turn's stream. The last one says `completed` only after the store has the answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from deployments.errors import ResponseCancelledError
from deployments.generation import ErrorItem
from deployments.responses.answers import Event, ResponseStream, final_status, sse_named_event
from deployments.responses.turn import CANCELLED, Turn
from deployments.store.errors import StoreError
from engine.text.output import OutputDelta


class TurnEvents:
    """Words one turn for `answer_events`, and completes it or gives it up at the end."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._stream = ResponseStream(turn.form)
        self._texts: list[str] = []

    async def events(self, delta: OutputDelta) -> str:
        """What is new. At the end of the answer, first stores it."""
        self._texts.append(delta.text)
        if delta.finish_reason is None:
            return _worded(self._stream.events(delta))
        try:
            answer = await self._turn.complete(replace(delta, text="".join(self._texts)))
        except StoreError as error:
            return _worded([self._stream.failed_event(ErrorItem.of(error))])
        if answer["status"] == "cancelled":
            return _worded([self._stream.error_event(CANCELLED)])
        if answer["status"] != final_status(delta) or answer["error"] is not None:
            return _worded([self._stream.closing_event(answer)])
        return _worded(self._stream.events(delta))

    async def error(self, error: ErrorItem) -> str:
        """The turn has no answer; it says why."""
        if error.is_a(ResponseCancelledError):
            return _worded([self._stream.error_event(error)])
        await self._turn.give_up(error)
        return _worded([self._stream.failed_event(error)])


def _worded(events: Iterable[Event]) -> str:
    return "".join(map(sse_named_event, events))
