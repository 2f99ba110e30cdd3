"""An executor for the core's tests: no model, but two tiers of blocks whose slots know which context their KV belongs to."""

from __future__ import annotations

import pickle
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import fields
from typing import Any

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.executor_protocol import ComputationFailedError
from engine.core.plan import BlockCopy, QuerySegment, StepPlan, StepResult
from engine.core.request import FinishReason, Request, SamplingParams
from engine.core.tier_table import PEER
from engine.errors import EngineError
from engine.step_loop import LookAhead, StepLoop
from engine.transports import Transports
from tests.delayed_tier import DelayedTier
from tests.peer_double import PeerEnd

FIRST_TOKEN, NUM_TOKENS = 100, 50


def next_token(context: tuple[int, ...]) -> int:
    """What comes after a context; depends on all of it."""
    return FIRST_TOKEN + zlib.crc32(array("I", context).tobytes()) % NUM_TOKENS


def answer_to(prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    context = prompt
    for _ in range(length):
        context += (next_token(context),)
    return context[len(prompt) :]


class ContextExecutor:
    """Follows the plan's contract and nothing else.

    A slot of either tier holds the context up to its token, so that a step which reads a wrong, stale, unwritten or not yet
    arrived slot fails at once. Ahead-of-time swap-outs run as early as they may in odd steps and as late as they may
    in even ones.

    context_of: request id -> its tokens, as the core knows them when the request starts. Plans do not tell them; here they
        are to check the tokens of the segments and the KV that the request finds.
    fails: the next steps raise, and whatever they were to write is garbage.
    computation_fails: only what they were to compute is; their copies are made.
    corrupted: CPU blocks whose content is no longer what was swapped out; swap-ins of them are reported (as with
    `verify_swaps`). lost: requests of which a step failed or was misled; what the step behind it, planned before the
    core knew, computes of them
        is garbage.
    plans: all that were executed. on_begin: called when the execution of a plan begins.
    """

    max_steps_in_flight = 2

    def __init__(
        self, num_blocks: int, chunk_size: int, num_cpu_blocks: int, context_of: Callable[[str], list[int]]
    ) -> None:
        self.chunk_size = chunk_size
        self.context_of = context_of
        self.slots: list[list[tuple[int, ...]]] = [[()] * chunk_size for _ in range(num_blocks)]
        self.cpu_slots: list[list[tuple[int, ...]]] = [[()] * chunk_size for _ in range(num_cpu_blocks)]
        self.token_ids: dict[str, list[int]] = {}
        self.num_known: dict[str, int] = {}  # the rest was sampled here
        self.block_tables: dict[str, list[int]] = {}
        self.fails = False
        self.computation_fails = False
        self.corrupted: set[int] = set()
        self.lost: set[str] = set()
        self.plans: list[StepPlan] = []
        self.on_begin: Callable[[StepPlan], None] = lambda plan: None
        self._broken_rule: AssertionError | None = None

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Executes it at once; what fails shows in the result."""
        step: Future[StepResult] = Future()
        try:
            step.set_result(self.execute(plan))
        except Exception as error:
            step.set_exception(error)
        return step

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.on_begin(plan)
        try:
            return self._execute(plan)
        except AssertionError as error:
            self._broken_rule = error
            raise

    def check_health(self) -> None:
        """A plan that breaks the contract is no fault that the loop goes on after."""
        if self._broken_rule is not None:
            raise self._broken_rule

    def _execute(self, plan: StepPlan) -> StepResult:
        for request_id in plan.ended:
            self.token_ids.pop(request_id, None)
            self.block_tables.pop(request_id, None)
        for start in plan.starts:
            assert start.request_id not in self.token_ids, "started twice, never told that it ended"
            known = self.context_of(start.request_id)
            assert start.num_tokens == len(known)
            assert start.token_ids == (tuple(known) if start.sampling.needs_token_ids else ())
            self.token_ids[start.request_id] = list(known)
            self.lost.discard(start.request_id)
            self.num_known[start.request_id] = len(known)
            self.block_tables[start.request_id] = list(start.block_table)
        for append in plan.appends:
            self.block_tables[append.request_id].append(append.block_id)
        if self.fails:
            for copy in (*plan.local_copies, *plan.swap_ins):
                self.slots[copy.target] = [()] * self.chunk_size
            for copy in (*plan.evictions, *plan.swap_outs):
                self.cpu_slots[copy.target] = [()] * self.chunk_size
            self._spoil(plan.segments)
            raise RuntimeError("injected fault")
        self._swap_out(plan.evictions)
        sources = [list(self.slots[copy.source]) for copy in plan.local_copies]
        for copy, content in zip(plan.local_copies, sources, strict=True):
            self.slots[copy.target] = content
        if plan.step_id % 2 or self.computation_fails:
            self._swap_out(plan.swap_outs)
        failed = [copy.target for copy in plan.swap_ins if copy.source in self.corrupted]
        for copy in plan.swap_ins:
            self.slots[copy.target] = (
                [()] * self.chunk_size if copy.target in failed else self.cpu_slots[copy.source][:]
            )
        if self.computation_fails:
            self._spoil(plan.segments)
            raise RuntimeError("corrupted, too") if failed else ComputationFailedError("injected fault")
        self.lost |= {name for name, table in self.block_tables.items() if not set(table).isdisjoint(failed)}
        self._spoil([segment for segment in plan.segments if segment.request_id in self.lost])
        for segment in plan.segments:
            if segment.request_id in self.lost:
                continue
            known = self.token_ids[segment.request_id]
            if segment.start >= self.num_known[segment.request_id]:
                assert (segment.token_ids, segment.context_len) == (None, len(known)), "told what was sampled here"
            else:
                assert segment.token_ids is not None, "not sampled here"
                assert list(segment.token_ids) == known[segment.start : segment.context_len]
            for position in range(segment.start, segment.context_len):
                self._set(segment.request_id, position, tuple(known[: position + 1]))
        token_ids = [self._sample(segment) for segment in plan.segments]
        if not plan.step_id % 2:
            self._swap_out(plan.swap_outs)
        return StepResult(
            plan.step_id,
            tuple(token_id for token_id in token_ids if token_id is not None),
            failed_swap_ins=tuple(failed),
        )

    def _sample(self, segment: QuerySegment) -> int | None:
        if segment.request_id in self.lost:
            return 0 if segment.samples else None
        known = self.token_ids[segment.request_id]
        for position in range(segment.context_len):
            assert self._get(segment.request_id, position) == tuple(known[: position + 1]), (segment, position)
        if not segment.samples:
            return None
        assert segment.context_len == len(known)
        known.append(next_token(tuple(known)))
        return known[-1]

    def read_slots(self, cpu_block: int) -> bytes | None:
        """What lies in a block of the CPU tier; None if it is corrupted."""
        return None if cpu_block in self.corrupted else pickle.dumps(self.cpu_slots[cpu_block])

    def write_slots(self, cpu_block: int, content: bytes | None) -> None:
        """None: garbage."""
        self.cpu_slots[cpu_block] = [()] * self.chunk_size if content is None else pickle.loads(content)
        self.corrupted.discard(cpu_block)

    def _swap_out(self, copies: tuple[BlockCopy, ...]) -> None:
        for copy in copies:
            self.cpu_slots[copy.target] = list(self.slots[copy.source])
            self.corrupted.discard(copy.target)

    def _spoil(self, segments: Sequence[QuerySegment]) -> None:
        self.lost.update(segment.request_id for segment in segments)
        for segment in segments:
            for position in range(segment.start, segment.context_len):
                self._set(segment.request_id, position, ())

    def _get(self, request_id: str, position: int) -> tuple[int, ...]:
        block_id = self.block_tables[request_id][position // self.chunk_size]
        return self.slots[block_id][position % self.chunk_size]

    def _set(self, request_id: str, position: int, context: tuple[int, ...]) -> None:
        block_id = self.block_tables[request_id][position // self.chunk_size]
        self.slots[block_id][position % self.chunk_size] = context

    def shutdown(self) -> None:
        pass


class Answers:
    """What the requests of a driver got: their tokens, their last outputs, and which ones ended with a failed step.

    before_result: called once the next step is drafted or launched, before the result of the first one is waited for.
    """

    def __init__(self, before_result: Callable[[], None]) -> None:
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.finished: dict[str, RequestOutput] = {}
        self.failed: list[str] = []
        self._before_result = before_result

    def add(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            self.tokens[output.request_id] += (output.token_id,) if output.num_output_tokens else ()
            assert len(self.tokens[output.request_id]) == output.num_output_tokens
            if output.finish_reason is not None:
                self.finished[output.request_id] = output

    def deliver(self) -> None:
        self._before_result()

    def fail(self, request_ids: Iterable[str], error: EngineError) -> None:
        self.failed = list(request_ids)


class CoreDriver:
    """Steps a core with a ContextExecutor by the engine's own loop; the clock is the number of the step.

    loop.look_ahead: drafts the next step while one is computed, unless a test changes it. An abort in flight comes before
    that in even steps, after it in odd ones.
    """

    def __init__(self, cache: CacheConfig, scheduling: SchedulingConfig) -> None:
        self.core = EngineCore(cache, scheduling)
        self.executor = ContextExecutor(
            cache.num_gpu_blocks,
            cache.chunk_size,
            cache.num_cpu_blocks,
            lambda request_id: self.core._requests[request_id].token_ids,
        )
        self.executor.on_begin = self._begin
        self.now = 0.0
        self.answers = Answers(self._after_look_ahead)
        self.slow_tier: DelayedTier | None = None
        self.peers: PeerEnd | None = None
        transports = {}
        if any(tier.is_store for tier in cache.slow_tiers):
            self.slow_tier = DelayedTier(self.executor.read_slots, self.executor.write_slots, seed=cache.num_gpu_blocks)
            transports[cache.slow_tiers[0].name] = self.slow_tier
        if self.core.handover is not None:
            memory = self.executor.read_slots, self.executor.write_slots
            self.peers = PeerEnd(self.core, *memory, lambda: self.now, seed=cache.num_gpu_blocks)
            transports[PEER] = self.peers
        transport = Transports(transports) if transports else None
        self.loop = StepLoop(
            self.core, self.executor, self.answers, lambda: self.now, LookAhead.DRAFT, transport, self.peers
        )
        self.requests: dict[str, Request] = {}
        self.plans, self.tokens, self.finished = self.executor.plans, self.answers.tokens, self.answers.finished
        self._to_abort: str | None = None

    def add(
        self,
        request_id: str,
        prompt: tuple[int, ...] | range,
        max_tokens: int | None = 4,
        conversation_id: str | None = None,
        **options: object,
    ) -> Request:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        request = Request(request_id, prompt, sampling, conversation_id=conversation_id, **options)  # type: ignore[arg-type]
        self.add_request(request)
        return request

    def add_request(self, request: Request) -> None:
        self.core.add_request(request, self.now)
        if self.peers is not None:
            self.peers.find(request)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = ()

    @property
    def failed(self) -> list[str]:
        """The requests that ended with the last step that failed."""
        return self.answers.failed

    def step(self, abort_in_flight: str | None = None) -> StepPlan | None:
        """One step; None if there was nothing to do. `abort_in_flight` is aborted while the step is computed."""
        self.now += 1
        self._to_abort = abort_in_flight
        if self.loop.in_flight:
            self._begin(self.loop.in_flight[0])
        plan = self.loop.step()
        self.core.check_integrity()
        return plan

    def execute(self, plan: StepPlan) -> None:
        """From a plan that a test had made to what came of it."""
        self.answers.add(self.core.update(plan, self.executor.execute(plan), self.now))
        self.core.check_integrity()

    def _begin(self, plan: StepPlan) -> None:
        if plan.step_id % 2 == 0 or self.loop.look_ahead is LookAhead.NOTHING:
            self._abort()

    def _after_look_ahead(self) -> None:
        if self.loop.in_flight:
            self.core.check_integrity()
            self._abort()

    def _abort(self) -> None:
        if self._to_abort is not None:
            self.core.abort(self._to_abort, self.now)
            self.core.check_integrity()
        self._to_abort = None

    def run(self) -> None:
        while self.core.has_requests:
            assert self.step() is not None or self.core.next_deadline_s() is not None

    def run_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            assert self.step() is not None

    def settle(self) -> list[StepPlan]:
        """The plans that move blocks while there are no requests."""
        assert not self.core.has_requests
        plans = []
        while (plan := self.step()) is not None or (self.slow_tier is not None and self.slow_tier.num_open):
            assert len(plans) < 100, "never comes to rest"
            if plan is not None:
                plans.append(plan)
            elif self.slow_tier is not None:
                self.slow_tier.wake()
        return plans

    def reason(self, request_id: str) -> FinishReason | None:
        return self.finished[request_id].finish_reason


@pytest.fixture
def make_core() -> Callable[..., CoreDriver]:
    """Options of either config -> CoreDriver; chunk_size 4 and costs 2, 3, 4, ... for chunks 0, 1, 2, ... by default."""
    cache_options = {field.name for field in fields(CacheConfig)}

    def make(num_gpu_blocks: int, **options: Any) -> CoreDriver:
        options = {
            "chunk_size": 4,
            "max_model_len": num_gpu_blocks * 4,
            "decode_reserve": 0.0,
            "cost_model": CostModel(constant=1.0, per_context_token=0.25, chunk_size=4),
            **options,
        }
        of_cache = {name: options.pop(name) for name in cache_options & options.keys()}
        return CoreDriver(CacheConfig(num_gpu_blocks=num_gpu_blocks, **of_cache), SchedulingConfig(**options))

    return make


@pytest.fixture
def answer() -> Callable[[tuple[int, ...], int], tuple[int, ...]]:
    """(prompt, length) -> what the executor answers when every slot it reads is right."""
    return answer_to
