"""Steps that are applied at once leave what the same steps leave that are scheduled one by one."""

import heapq
import random

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.plan import StepPlan, StepResult, TransferEnd
from engine.core.request import Request, SamplingParams
from engine.core.tier_table import TierSpec
from tests import nightly

TRANSFER_S = 2.5


def token_at(request: Request, position: int) -> int:
    """What a request samples there; requests with prompts of one kind say the same."""
    return 100 + (7 * position + request.token_ids[0]) % 50


class Clocked:
    """Drives a core with a clock that goes by the tokens of each step; no executor."""

    def __init__(self, cache: CacheConfig, scheduling: SchedulingConfig, *, runs_ahead: bool) -> None:
        self.core = EngineCore(cache, scheduling)
        self.now = 0.0
        self.plans: dict[int, StepPlan] = {}
        self.finished: dict[str, tuple[object, ...]] = {}
        self.requests: dict[str, Request] = {}
        self.num_foreseen = 0
        self._runs_ahead = runs_ahead
        self._transfers: list[tuple[float, int]] = []

    def run(self, arrivals: list[tuple[float, Request]]) -> None:
        arrivals = arrivals[::-1]
        while arrivals or self.core.has_requests:
            while arrivals and arrivals[-1][0] <= self.now:
                request = arrivals.pop()[1]
                self.requests[request.request_id] = request
                self.core.add_request(request, self.now)
            self._end_transfers()
            next_s = min(arrivals[-1][0] if arrivals else float("inf"), self._next_end_s())
            num_steps = self.core.foresee_decodes().num_steps if self._runs_ahead else 0
            if num_steps:
                self._advance(num_steps, next_s)
            elif not self._step():
                self.now = min(next_s, self.core.next_deadline_s() or float("inf"))
            self.core.check_integrity()

    def _advance(self, num_steps: int, next_s: float) -> None:
        num_running = len(self.core._scheduler.running)
        times = [self.now]
        while len(times) <= num_steps and times[-1] < next_s:
            times.append(times[-1] + step_s(num_running))
        outputs = self.core.advance(
            times, lambda request, num: [token_at(request, request.num_tokens + i) for i in range(num)]
        )
        self.num_foreseen += len(times) - 1
        self.now = times[-1]
        self._note(outputs)

    def _step(self) -> bool:
        plan = self.core.schedule(self.now)
        for transfer in self.core.take_transfers():
            heapq.heappush(self._transfers, (self.now + TRANSFER_S, transfer.transfer_id))
        if plan is None:
            return False
        self.plans[plan.step_id] = plan
        tokens = [
            token_at(request, request.num_tokens)
            for segment in plan.segments
            if segment.samples and (request := self.requests[segment.request_id])
        ]
        self.now += step_s(plan.num_tokens)
        self._note(self.core.update(plan, StepResult(plan.step_id, tuple(tokens)), self.now))
        return True

    def _note(self, outputs) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self.finished[output.request_id] = (output, self.now)

    def _next_end_s(self) -> float:
        return self._transfers[0][0] if self._transfers else float("inf")

    def _end_transfers(self) -> None:
        while self._next_end_s() <= self.now:
            _, transfer_id = heapq.heappop(self._transfers)
            self.core.complete_transfer(TransferEnd(transfer_id, ok=transfer_id % 9 > 0, seconds=TRANSFER_S), self.now)

    def contents(self) -> dict[bytes, tuple[object, ...]]:
        return {
            chunk.key: (tuple(chunk.blocks), chunk.last_active, chunk.num_tokens, chunk.owner_id)
            for chunk in self.core._cache.index
        }


def step_s(num_tokens: int) -> float:
    return 0.5 + num_tokens / 64


def random_pair(rng: random.Random) -> list[Clocked]:
    num_gpu_blocks = rng.randint(10, 20)
    num_cpu_blocks = rng.choice([0, 6, 30])
    slow = TierSpec(name="slow", num_blocks=rng.choice([8, 40]), is_fast=False, max_wait_s=4.0)
    cache = CacheConfig(
        chunk_size=4,
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=num_cpu_blocks,
        eviction_policy=rng.choice(["retention_value", "lru"]),
        swap_out_watermark=rng.choice([0.0, 0.25, 0.6]),
        max_swap_outs=rng.choice([1, 4, 16]),
        write_through=rng.random() < 0.3,
        keep=rng.random() < 0.85,
        cost_model=CostModel(
            1.0, 0.25, 4, load_costs={"cpu": rng.choice([0.0, 1.0])}, is_in_seconds=rng.random() < 0.5
        ),
        slow_tiers=(slow,) if num_cpu_blocks and rng.random() < 0.3 else (),
    )
    scheduling = SchedulingConfig(
        max_model_len=40,
        max_num_batched_tokens=rng.choice([3, 8, 64]),
        max_num_seqs=rng.choice([2, 4, 8]),
        decode_reserve=rng.choice([0.0, 0.2]),
        prefill_batch_tokens=rng.choice([None, 1, 5]),
    )
    return [Clocked(cache, scheduling, runs_ahead=runs_ahead) for runs_ahead in (False, True)]


def random_arrivals(rng: random.Random, num_requests: int) -> list[tuple[float, Request]]:
    """Conversations, of which some are forks of others."""
    histories = {name: [rng.randrange(3)] * rng.randint(1, 5) for name in "abcde"}
    tenants = rng.choice([{}, {"a": ("acme", 3.0), "b": ("acme", 3.0)}])
    now, arrivals = 0.0, []
    for number in range(num_requests):
        now += rng.choice([0.0, 0.25, 3.0, 20.0])
        name = rng.choice(list(histories))
        history = histories[rng.choice(list(histories)) if rng.random() < 0.2 else name]
        prompt = [*history, *([rng.randrange(3)] * rng.randint(1, 6))]
        num_tokens = rng.choice([1, 2, 5, 12])
        if len(prompt) + num_tokens > 36:
            prompt = prompt[:6]
        tenant, weight = tenants.get(name, ("local", 1.0))
        request = Request(
            f"r{number}",
            prompt,
            SamplingParams(temperature=0.0, max_tokens=num_tokens),
            conversation_id=name,
            tenant=tenant,
            weight=weight,
            eos_token_ids=(100,) if rng.random() < 0.1 else (),
        )
        arrivals.append((now, request))
        first = request.token_ids[0]
        histories[name] = [*prompt, *(100 + (7 * (len(prompt) + i) + first) % 50 for i in range(num_tokens))]
    return arrivals


def compare(seed: int) -> Clocked:
    rng = random.Random(seed)
    single, ahead = random_pair(rng)
    single.run(random_arrivals(random.Random(seed), 24))
    ahead.run(random_arrivals(random.Random(seed), 24))
    assert single.finished == ahead.finished
    assert {name: r.token_ids for name, r in single.requests.items()} == {
        name: r.token_ids for name, r in ahead.requests.items()
    }
    assert ahead.plans.items() <= single.plans.items()
    skipped = [plan for step_id, plan in single.plans.items() if step_id not in ahead.plans]
    assert len(skipped) == ahead.num_foreseen
    assert not any(plan.swap_ins or plan.swap_outs or plan.evictions or plan.local_copies for plan in skipped)
    assert single.core.get_statistics() == ahead.core.get_statistics()
    assert single.contents() == ahead.contents()
    assert single.now == ahead.now
    return ahead


@pytest.mark.parametrize("hundred", range(10 if nightly.IS_NIGHTLY else 1))
def test_a_run_of_steps_equals_the_steps(hundred):
    """Outputs with their times, tokens, evictions, swaps, every plan that is still made, and what lies where at the end."""
    drivers = [compare(100 * hundred + seed) for seed in range(100)]
    stats = [driver.core.stats for driver in drivers]
    assert sum(driver.num_foreseen for driver in drivers) > 0.2 * sum(s.num_steps for s in stats)
    assert all(
        sum(s.evictions.get(reason, 0) for s in stats) for reason in ("gpu_reclaimed", "gpu_dropped", "cpu_dropped")
    )
    assert all(sum(getattr(s, name) for s in stats) for name in ("num_suspensions", "num_swap_ins", "num_swap_outs"))
