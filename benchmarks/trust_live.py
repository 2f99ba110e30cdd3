"""Sessions over a live engine, for benchmarks/trust.py: a row for each turn, and for each step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.executor_protocol import Executor
from engine.core.plan import StepPlan, StepResult
from engine.core.request import SamplingParams
from engine.executor.group import make_executor
from engine.generation import Generation
from engine.simulator.step_cost import StepWork
from engine.text.prompt import TokenPrompt
from engine.workloads.session import Session
from engine.workloads.tokens import TokenContext, random_tokens

# Of a row of a turn; times in seconds from the beginning, as TurnRow has them.
TURN_FIELDS = ("sent_s", "first_token_s", "finished_s", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens")
# Of a row of a step: when it began, how long the executor took, and what it did.
STEP_FIELDS = ("begin_s", "took_s", *StepWork._fields)
FIRST_TOKEN_ID = 300  # those below may be special


class LiveClients:
    """A closed loop: the next session begins as one ends. No turn is due after `until_s`; those under way are heard out."""

    def __init__(self, engine: AsyncEngine, sessions: Iterator[Session], vocab_size: int, until_s: float) -> None:
        """The time begins now. turns: rows of TURN_FIELDS."""
        self.turns: list[tuple[float, ...]] = []
        self.start_s = time.perf_counter()
        self._engine, self._sessions, self._vocab_size, self._until_s = engine, sessions, vocab_size, until_s

    async def run(self, num_active: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(num_active):
                group.create_task(self._take_sessions())

    async def _take_sessions(self) -> None:
        while (session := next(self._sessions, None)) is not None and await self._hold(session):
            pass

    async def _hold(self, session: Session) -> bool:
        """Whether the session ended before the run. Times of a turn count from when it was due."""
        context = TokenContext(lambda span: random_tokens(span, self._vocab_size, FIRST_TOKEN_ID))
        due_s = self._now()
        for number, turn in enumerate(session.turns):
            due_s += turn.pause_s
            if due_s >= self._until_s:
                return False
            prompt = TokenPrompt(tuple(context.ask(turn)))
            sampling = SamplingParams(temperature=0.0, max_tokens=turn.output_tokens, ignore_eos=True)
            generation = Generation(f"{session.session_id}.{number}", session.session_id, prompt, sampling)
            await asyncio.sleep(due_s - self._now())
            first_s, num_cached, answer = 0.0, 0, []
            async for delta in self._engine.generate(generation):
                first_s = first_s or self._now()
                answer += delta.token_ids
                num_cached = delta.num_cached_tokens
            finished_s = self._now()
            context.add_answer(answer)
            self.turns.append((due_s, first_s, finished_s, len(prompt.token_ids), num_cached, len(answer)))
            due_s = finished_s
        return True

    def _now(self) -> float:
        return time.perf_counter() - self.start_s


class WatchedExecutor:
    """Notes each step; the executor itself in all else. steps: rows of STEP_FIELDS."""

    def __init__(self, executor: Executor) -> None:
        self.steps: list[tuple[float, ...]] = []
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def execute(self, plan: StepPlan) -> StepResult:
        begin_s = time.perf_counter()
        result = self._executor.execute(plan)
        self.steps.append((begin_s, time.perf_counter() - begin_s, *StepWork.of(plan)))
        return result


async def run_live(
    config: EngineConfig, sessions: Sequence[Session], warm_up: Sequence[Session], num_active: int, until_s: float
) -> dict[str, Any]:
    """One engine, one load: turns, steps, counters of the engine, and seconds of processor time.

    warm_up: sessions before the time begins, so that no first step is among the others.
    """
    watched: list[WatchedExecutor] = []

    def make_watched(config: EngineConfig) -> Any:
        watched.append(WatchedExecutor(make_executor(config)))
        return watched[-1]

    engine = AsyncEngine(config, make_watched)
    try:
        vocab_size = watched[0].facts.model.vocab_size
        await LiveClients(engine, iter(warm_up), vocab_size, until_s=60.0).run(4)
        watched[0].steps.clear()
        before, cpu_s = engine.get_statistics(), time.process_time()
        clients = LiveClients(engine, iter(sessions), vocab_size, until_s)
        await clients.run(num_active)
        cpu_s = time.process_time() - cpu_s
        counters = {
            name: value - before[name]
            for name, value in engine.get_statistics().items()
            if isinstance(value, int) and isinstance(before[name], int)
        }
        await engine.check_integrity()
    finally:
        await engine.shutdown()
    steps = [(begin_s - clients.start_s, *rest) for begin_s, *rest in watched[0].steps]
    return {"num_active": num_active, "cpu_s": cpu_s, "counters": counters, "turns": clients.turns, "steps": steps}
