"""The sessions of one process, in time: a turn is sent its pause after the answer before it is complete."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.bench.apis import Content, counts_of, make_conversation
from engine.bench.client import Answered, Client
from engine.bench.turns import LoopLag, TurnRecord
from engine.workloads.session import Session, Turn

# How often the loop's lag is looked at.
HEARTBEAT_S = 0.01


@dataclass(frozen=True, slots=True)
class Load:
    """What a process is to do.

    run_id: part of the sessions' names, so that no two runs share one.
    num_active: sessions at once; None = each session starts at its own time.
    max_s: after this, no further turn is sent; those under way are heard out.
    """

    run_id: str
    content: Content
    num_active: int | None = None
    max_s: float = 600.0


class Driver:
    """Drives sessions over one client. Times are told from `start_s` of time.perf_counter on."""

    def __init__(self, client: Client, load: Load, start_s: float, on_turn: Callable[[TurnRecord], None]) -> None:
        self._client, self._load, self._start_s, self._on_turn = client, load, start_s, on_turn
        self._beats: list[float] = []

    async def run(self, sessions: Sequence[Session], next_index: Callable[[], int]) -> LoopLag:
        """All sessions in order. Cancel it to stop; the turns that are complete were reported.

        next_index: in a closed loop, gives each number once over all processes, from 0; those past the end end the loop.

        Raises ClientFault.
        """
        heartbeat = asyncio.create_task(self._beat())
        try:
            async with asyncio.TaskGroup() as group:
                if self._load.num_active is None:
                    for session in sorted(sessions, key=lambda session: session.start_s):
                        await self._sleep_until(session.start_s)
                        if self._is_over(session.start_s):
                            break
                        group.create_task(self._hold(session, session.start_s))
                else:
                    for _ in range(self._load.num_active):
                        group.create_task(self._take_turns(sessions, next_index))
        except* Exception as errors:
            raise errors.exceptions[0] from None
        finally:
            heartbeat.cancel()
        return self.loop_lag()

    def loop_lag(self) -> LoopLag:
        beats = sorted(self._beats) or [0.0]
        return LoopLag(beats[min(len(beats) - 1, int(len(beats) * 0.99))], beats[-1])

    async def _take_turns(self, sessions: Sequence[Session], next_index: Callable[[], int]) -> None:
        await self._sleep_until(0.0)
        while (index := next_index()) < len(sessions) and not self._is_over(0.0):
            await self._hold(sessions[index], None)

    async def _hold(self, session: Session, due_s: float | None) -> None:
        """One session, to its end or to the first turn that fails. due_s: of its first turn; None = at once."""
        conversation = make_conversation(self._client.api, session, self._load.content)
        name = f"{self._load.run_id}.{session.session_id}"
        for number, turn in enumerate(session.turns):
            request = self._client.request(conversation.ask(turn), turn.output_tokens, name)
            if due_s is None:
                due_s = self._now()
            await self._sleep_until(due_s)
            if self._is_over(due_s):
                return
            answered = await self._client.ask(request, conversation)
            record = self._record(session, number, turn, due_s, answered)
            self._on_turn(record)
            if not record.is_good:
                return
            conversation.keep(turn, answered.heard)
            due_s = record.end_s + (session.turns[number + 1].pause_s if number + 1 < len(session.turns) else 0.0)

    def _record(self, session: Session, number: int, turn: Turn, due_s: float, answered: Answered) -> TurnRecord:
        counts = counts_of(answered.heard)
        error = answered.heard.error
        if not error and answered.first_s is None:
            error = "an empty answer"
        return TurnRecord(
            session.session_id,
            number,
            turn.tool or turn.kind,
            due_s,
            answered.sent_s - self._start_s,
            None if answered.first_s is None else answered.first_s - self._start_s,
            answered.end_s - self._start_s,
            counts.num_prompt_tokens,
            counts.num_output_tokens or answered.num_pieces,
            counts.num_output_tokens is not None,
            counts.num_cached_tokens,
            counts.cached_by,
            answered.max_gap_s,
            answered.heard.finish_reason,
            error,
            answered.replica,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._start_s

    def _is_over(self, due_s: float) -> bool:
        return due_s > self._load.max_s or self._now() > self._load.max_s

    async def _sleep_until(self, due_s: float) -> None:
        """Not past the end of the run."""
        wait_s = min(due_s, self._load.max_s) - self._now()
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    async def _beat(self) -> None:
        while True:
            before_s = time.perf_counter()
            await asyncio.sleep(HEARTBEAT_S)
            self._beats.append(time.perf_counter() - before_s - HEARTBEAT_S)
