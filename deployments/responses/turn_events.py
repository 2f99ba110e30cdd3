"""The events of a turn's stream. The last one says `completed` only after the store has the answer."""

from __future__ import annotations

from collections.abc import Iterable

from deployments.errors import ResponseCancelledError
from deployments.generation import ErrorItem
from deployments.responses.answers import (
    ResponseStream,
    closing_event,
    error_event,
    failed,
    final_status,
    sse_named_event,
)
from deployments.responses.output import Event
from deployments.responses.turn import Turn
from deployments.store.errors import StoreError
from engine.text.output import OutputDelta


class TurnEvents:
    """Words one turn for `answer_events`, and completes it or gives it up at the end."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._stream = ResponseStream(turn.form)

    async def events(self, delta: OutputDelta) -> str:
        """What is new. At the end of the answer, first stores it."""
        told = self._stream.read(delta)
        if delta.finish_reason is None:
            return self._worded(told)
        try:
            answer = await self._turn.complete(self._stream.whole(), delta.transcript)
        except StoreError as error:
            return self._worded([self._failed_event(ErrorItem.of(error))])
        if answer["status"] != final_status(delta) or answer["error"] is not None:  # it became something else meanwhile
            told = []
        return self._worded([*told, closing_event(answer)])

    async def error(self, error: ErrorItem) -> str:
        """The turn has no answer; it says why."""
        if error.is_a(ResponseCancelledError):
            return self._worded([error_event(error)])
        await self._turn.give_up(error)
        return self._worded([self._failed_event(error)])

    def _failed_event(self, error: ErrorItem) -> Event:
        return closing_event(failed(self._stream.in_progress(), error))

    def _worded(self, events: Iterable[Event]) -> str:
        return "".join(map(sse_named_event, self._stream.numbered(events)))
