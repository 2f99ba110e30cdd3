"""What is told of each generation to those who watch: its beginning, and its outcome, whatever that is.

    RequestLog     a line in the log (request_log.py)
    IngressTraces  spans (traces.py)

Without any, nothing here runs. Knows no HTTP and no Ray.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from deployments.errors import InternalError
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest
from deployments.http.admission import Generates
from engine.errors import PensieveError
from engine.text.output import OutputDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a generation ended.

    begun_s, ended_s: Unix times. first_s: seconds until its first item came; None = none did.
    last: the latest delta. error: what it ended with. Without either a finish_reason or an error, its client left, or its
        time was over.
    replica_rank: of the latest delta.
    """

    begun_s: float
    ended_s: float
    first_s: float | None = None
    last: OutputDelta | None = None
    error: ErrorItem | None = None
    replica_rank: int | None = None

    @property
    def is_finished(self) -> bool:
        return self.last is not None and self.last.finish_reason is not None

    @property
    def word(self) -> str:
        """finished, failed or aborted."""
        return "finished" if self.is_finished else "aborted" if self.error is None else "failed"


End = Callable[[Outcome], None]


class Watch(Protocol):
    """Hears of generations. `begin` and what it returns may neither wait nor raise."""

    def begin(self, request: GenerationRequest) -> tuple[GenerationRequest, End]:
        """One begins; the request as it is to go on, and what is to be called once at its end."""
        ...

    def close(self) -> None:
        """Pass on what is left; may block."""
        ...


class Watched:
    """An engine whose generations are watched; what clients get is the same."""

    def __init__(self, engine: Generates, watches: Sequence[Watch]) -> None:
        self._engine = engine
        self._watches = watches

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        """See EngineClient.generate."""
        asked, ends = replace(request, explains=True), []
        for watch in self._watches:
            asked, end = watch.begin(asked)
            ends.append(end)
        start_s, outcome = time.monotonic(), Outcome(begun_s=time.time(), ended_s=0.0)
        try:
            async with aclosing(self._engine.generate(asked)) as items:
                async for item in items:
                    if isinstance(item, ErrorItem):
                        outcome = replace(outcome, error=item)
                    else:
                        first_s = time.monotonic() - start_s if outcome.first_s is None else outcome.first_s
                        outcome = replace(outcome, first_s=first_s, last=item.delta, replica_rank=item.replica_rank)
                    yield item if request.explains else _unexplained(item)
        except Exception as error:
            told = error if isinstance(error, PensieveError) else InternalError("internal error")
            outcome = replace(outcome, error=ErrorItem.of(told))
            raise
        finally:
            outcome = replace(outcome, ended_s=outcome.begun_s + time.monotonic() - start_s)
            for end in ends:
                end(outcome)


def _unexplained(item: GenerationItem) -> GenerationItem:
    """What a client gets that did not ask for an explanation."""
    if not isinstance(item, DeltaItem) or item.delta.explanation is None:
        return item
    return replace(item, delta=replace(item.delta, explanation=None))
