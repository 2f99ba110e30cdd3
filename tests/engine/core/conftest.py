"""An executor for the core's tests: no model, but a tier of blocks whose slots know which context their KV belongs to."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable

import pytest

from engine.core.cost_model import CostModel
from engine.core.engine_core import CoreConfig, EngineCore, RequestOutput
from engine.core.plan import SampledToken, StepPlan, StepResult
from engine.core.request import FinishReason, Request, SamplingParams

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
    """Follows the plan's contract and nothing else. A slot holds the context up to its token, so that a step which reads
    a wrong, stale or unwritten slot fails at once."""

    def __init__(self, num_blocks: int, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.slots: list[list[tuple[int, ...]]] = [[()] * chunk_size for _ in range(num_blocks)]
        self.token_ids: dict[str, list[int]] = {}
        self.block_tables: dict[str, list[int]] = {}
        self.fails = False

    def execute(self, plan: StepPlan) -> StepResult:
        for request_id in plan.ended:
            self.token_ids.pop(request_id, None)
            self.block_tables.pop(request_id, None)
        for start in plan.starts:
            assert start.request_id not in self.token_ids, "started twice, never told that it ended"
            self.token_ids[start.request_id] = list(start.token_ids)
            self.block_tables[start.request_id] = list(start.block_table)
        for append in plan.appends:
            self.block_tables[append.request_id].append(append.block_id)
        if self.fails:
            for target in [copy.target for copy in plan.gpu_copies]:
                self.slots[target] = [()] * self.chunk_size
        else:
            sources = [list(self.slots[copy.source]) for copy in plan.gpu_copies]
            for copy, content in zip(plan.gpu_copies, sources, strict=True):
                self.slots[copy.target] = content
        for segment in plan.segments:
            known = self.token_ids[segment.request_id]
            assert list(segment.token_ids) == known[segment.start : segment.context_len]
            for position in range(segment.start, segment.context_len):
                self._set(segment.request_id, position, () if self.fails else tuple(known[: position + 1]))
        if self.fails:
            raise RuntimeError("injected fault")
        samples = []
        for segment in plan.segments:
            known = self.token_ids[segment.request_id]
            for position in range(segment.context_len):
                assert self._get(segment.request_id, position) == tuple(known[: position + 1]), (segment, position)
            if segment.samples:
                assert segment.context_len == len(known)
                known.append(next_token(tuple(known)))
                samples.append(SampledToken(segment.request_id, known[-1]))
        return StepResult(plan.step_id, tuple(samples))

    def _get(self, request_id: str, position: int) -> tuple[int, ...]:
        block_id = self.block_tables[request_id][position // self.chunk_size]
        return self.slots[block_id][position % self.chunk_size]

    def _set(self, request_id: str, position: int, context: tuple[int, ...]) -> None:
        block_id = self.block_tables[request_id][position // self.chunk_size]
        self.slots[block_id][position % self.chunk_size] = context

    def shutdown(self) -> None:
        pass


class CoreDriver:
    """Steps a core with a ContextExecutor; the clock is the number of the step."""

    def __init__(self, config: CoreConfig) -> None:
        self.core = EngineCore(config)
        self.executor = ContextExecutor(config.num_gpu_blocks, config.chunk_size)
        self.now = 0.0
        self.plans: list[StepPlan] = []
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.finished: dict[str, RequestOutput] = {}

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
        self.core.add_request(request, self.now)
        self.requests[request_id] = request
        self.tokens[request_id] = ()
        return request

    def step(self) -> StepPlan | None:
        """One step; None where there was nothing to do. A failing executor is answered by `fail_step`."""
        self.now += 1
        plan = self.core.schedule(self.now)
        if plan is None:
            return None
        self.plans.append(plan)
        try:
            result = self.executor.execute(plan)
        except RuntimeError:
            self.failed = self.core.fail_step(plan, self.now)
        else:
            for output in self.core.update(plan, result, self.now):
                self.tokens[output.request_id] += tuple(sample.token_id for sample in output.samples)
                if output.finish_reason is not None:
                    self.finished[output.request_id] = output
        self.core.check_integrity()
        return plan

    def run(self) -> None:
        while self.core.has_requests:
            assert self.step() is not None

    def reason(self, request_id: str) -> FinishReason | None:
        return self.finished[request_id].finish_reason


@pytest.fixture
def make_core() -> Callable[..., CoreDriver]:
    """CoreConfig options -> CoreDriver; chunk_size 4 and costs 2, 3, 4, ... for chunks 0, 1, 2, ... unless told otherwise."""

    def make(num_gpu_blocks: int, **options: object) -> CoreDriver:
        defaults = {
            "chunk_size": 4,
            "max_model_len": num_gpu_blocks * 4,
            "decode_reserve": 0.0,
            "cost_model": CostModel(constant=1.0, per_context_token=0.25, chunk_size=4),
        }
        return CoreDriver(CoreConfig(num_gpu_blocks=num_gpu_blocks, **{**defaults, **options}))  # type: ignore[arg-type]

    return make


@pytest.fixture
def answer() -> Callable[[tuple[int, ...], int], tuple[int, ...]]:
    """(prompt, length) -> what the executor answers when every slot it reads is right."""
    return answer_to
