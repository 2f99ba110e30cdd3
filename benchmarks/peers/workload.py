"""The conversations that every system gets, and the client that measures them.

The same code for all systems, and the standard library alone, because it runs in the environment of each. Knows no engine.

Sessions are rows of turns. Each turn sends the whole history as token ids, the answers being those that this system
generated, and `prompt_len` new ids. At most `num_active` turns run at once: a session that got its answer goes to the end of
the row, or to a random place in it, and the first one there sends its next turn. With as many active as there are sessions,
none waits.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FIRST_TOKEN_ID = 32  # what is below may be special tokens
HISTORY = -1  # the turn in front of the ones that count


@dataclass(frozen=True, slots=True)
class Workload:
    """What is sent.

    prompt_len: new tokens of a turn. output_len: tokens of an answer. vocab_size: of the model.
    history_len: tokens of a turn that each session sends before the ones that count; 0 = it has none.
    is_shuffled: a session comes back at a random place in the row. At its end, all others come in between, which is the
        worst that can happen to a cache that is too small.
    """

    name: str
    num_sessions: int
    num_active: int
    num_turns: int = 5
    prompt_len: int = 200
    output_len: int = 64
    vocab_size: int = 2048
    seed: int = 0
    history_len: int = 0
    is_shuffled: bool = False

    @property
    def max_context_len(self) -> int:
        """Tokens of a session after its last turn."""
        history_len = self.history_len + self.output_len if self.history_len else 0
        return history_len + self.num_turns * (self.prompt_len + self.output_len)

    @property
    def working_set(self) -> int:
        """Tokens of all sessions after their last turns."""
        return self.num_sessions * self.max_context_len

    def new_tokens(self, session: str, turn: int) -> list[int]:
        """What a turn adds to its session: drawn at random, so that no two turns have a prefix in common."""
        rng = random.Random(f"{self.seed}.{session}.{turn}")
        num_tokens = self.history_len if turn == HISTORY else self.prompt_len
        return [rng.randrange(FIRST_TOKEN_ID, self.vocab_size) for _ in range(num_tokens)]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. session is a number from 0: of the sessions, and of the warm-up's own ones behind them."""

    session: int
    turn: int
    prompt: tuple[int, ...]
    output_len: int

    @property
    def request_id(self) -> str:
        return f"session-{self.session}.turn-{self.turn}"

    @property
    def session_id(self) -> str:
        return f"session-{self.session}"


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """What the client saw of one turn.

    ttft_s: from sending to the first token.
    s_per_token: from there, per later token.
    """

    session: int
    turn: int
    num_prompt_tokens: int
    ttft_s: float
    s_per_token: float
    token_ids: tuple[int, ...]


# Sends one turn and yields its tokens as they come.
Generate = Callable[[Turn], AsyncIterator[Sequence[int]]]


async def run_workload(workload: Workload, generate: Generate, report_turn: Callable[[], None]) -> dict[str, Any]:
    """Measure all turns, after a warm-up: the histories, or else a turn of as many other sessions as are active at once."""
    contexts: dict[int, list[int]] = {session: [] for session in range(workload.num_sessions)}
    if workload.history_len:
        await _run_sessions(workload, contexts, range(HISTORY, 0), generate, lambda: None)
    else:
        warm_up = range(workload.num_sessions, workload.num_sessions + workload.num_active)
        await _run_sessions(workload, {session: [] for session in warm_up}, range(1), generate, lambda: None)
    start = time.perf_counter()
    records = await _run_sessions(workload, contexts, range(workload.num_turns), generate, report_turn)
    seconds = time.perf_counter() - start
    records.sort(key=lambda record: (record.session, record.turn))
    return {
        "seconds": seconds,
        "output_tokens_per_s": sum(len(record.token_ids) for record in records) / seconds,
        "num_prompt_tokens": sum(record.num_prompt_tokens for record in records),
        "turns": [asdict(record) for record in records],
    }


async def _run_sessions(
    workload: Workload,
    contexts: dict[int, list[int]],
    turns: range,
    generate: Generate,
    report_turn: Callable[[], None],
) -> list[TurnRecord]:
    """These turns of the sessions of `contexts`, which grow."""
    ready = deque((session, turns.start) for session in contexts)
    places = random.Random(workload.seed)
    records: list[TurnRecord] = []

    async def work() -> None:
        while ready:
            session, number = ready.popleft()
            context = contexts[session]
            context += workload.new_tokens(str(session), number)
            record = await _measure(Turn(session, number, tuple(context), workload.output_len), generate)
            context += record.token_ids
            records.append(record)
            report_turn()
            if number + 1 in turns:
                place = places.randrange(len(ready) + 1) if workload.is_shuffled else len(ready)
                ready.insert(place, (session, number + 1))

    # A worker that finds the row empty may stop: each session under way comes back to it with a worker of its own.
    await asyncio.gather(*(work() for _ in range(workload.num_active)))
    return records


async def _measure(turn: Turn, generate: Generate) -> TurnRecord:
    token_ids: list[int] = []
    first = last = 0.0
    start = time.perf_counter()
    async for new in generate(turn):
        if new:
            last = time.perf_counter()
            first = first or last
            token_ids += new
    if len(token_ids) != turn.output_len:
        raise RuntimeError(f"{turn.request_id}: {len(token_ids)} tokens instead of {turn.output_len}")
    return TurnRecord(
        turn.session,
        turn.turn,
        len(turn.prompt),
        first - start,
        (last - first) / max(1, len(token_ids) - 1),
        tuple(token_ids),
    )
