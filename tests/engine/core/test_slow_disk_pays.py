"""A disk tier is never slower than none, at any speed of the disk and size of the working set.

In virtual time: steps take what a cost model says, transfers what the speed of one device says that reads and writes share.
So the figures depend on what the core decides, and on nothing else.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.plan import SlowTransfer, StepPlan, StepResult, TransferEnd
from engine.core.request import Request, SamplingParams
from engine.core.tier_table import CPU, TierSpec
from tests.nightly import IS_NIGHTLY

CHUNK_SIZE = 32
# A small model on two cores, about: seconds of a step, of a token, and of a token for each token of its context.
STEP_S, TOKEN_S, CONTEXT_S = 0.01, 0.0013, 0.25e-6
SWAP_S = 0.0002  # of a chunk, between the fast tiers
CHUNK_BYTES, LATENCY_S, SLOW_BYTES_PER_S = 0.75e6, 1e-4, 5e6
NUM_ROUNDS = 6
CONTEXT_LEN, NUM_NEW_TOKENS, NUM_ANSWER_TOKENS = 192, 16, 2
TOKEN_ID = 7  # of every answer


@dataclass
class Disk:
    """One device, which carries out a transfer after the other; loads before stores, as they have threads of their own.

    slow_from_s: from then on it is slower than computing.
    """

    bytes_per_s: float
    slow_from_s: float = math.inf
    free_at_s: float = 0.0
    last_load_s: float = 0.0
    loads: list[tuple[float, SlowTransfer]] = field(default_factory=list)
    stores: list[tuple[float, SlowTransfer]] = field(default_factory=list)
    ends: list[tuple[float, int, TransferEnd]] = field(default_factory=list)

    def begin(self, transfer: SlowTransfer, now: float) -> None:
        (self.loads if transfer.copy.target_tier == CPU else self.stores).append((now, transfer))

    def read_s(self, now: float) -> float:
        """Of a chunk."""
        return LATENCY_S + CHUNK_BYTES / (self.bytes_per_s if now < self.slow_from_s else SLOW_BYTES_PER_S)

    def advance(self, now: float) -> None:
        """Begin what the device has time for."""
        while self.free_at_s <= now and (self.loads or self.stores):
            is_load = bool(self.loads)
            begun_s, transfer = (self.loads or self.stores).pop(0)
            self.free_at_s = max(self.free_at_s, now) + self.read_s(now)
            end = TransferEnd(transfer.transfer_id, True, self.free_at_s - max(begun_s, self.last_load_s))
            if is_load:  # what a load has waited for a store counts, as its thread does
                self.last_load_s = self.free_at_s
            heapq.heappush(self.ends, (self.free_at_s, transfer.transfer_id, end))

    def take_ended(self, now: float) -> list[TransferEnd]:
        return [heapq.heappop(self.ends)[2] for _ in range(sum(due <= now for due, *_ in self.ends))]


class VirtualEngine:
    """A core, and the time that goes by while it computes."""

    def __init__(self, disk: Disk | None, num_fast_blocks: int, has_profile: bool) -> None:
        self.now = 0.0
        self.disk = disk
        tier = TierSpec(name="disk", num_blocks=10_000, is_fast=False, stores_first_use=False, rewrite_s=3600.0)
        costs = CostModel(
            constant=TOKEN_S * CHUNK_SIZE,
            per_context_token=CONTEXT_S * CHUNK_SIZE,
            chunk_size=CHUNK_SIZE,
            load_costs={"cpu": SWAP_S} if has_profile else {},
            is_in_seconds=has_profile,
        )
        self.core = EngineCore(
            CacheConfig(
                chunk_size=CHUNK_SIZE,
                num_gpu_blocks=num_fast_blocks,
                num_cpu_blocks=num_fast_blocks,
                cost_model=costs,
                slow_tiers=(tier,) if disk else (),
            ),
            SchedulingConfig(max_model_len=num_fast_blocks * CHUNK_SIZE, decode_reserve=0.02),
        )
        if disk:
            self.core.note_load_price("disk", disk.read_s(self.now), self.now)

    def step_s(self, plan: StepPlan) -> float:
        tokens = sum(segment.query_len for segment in plan.segments)
        pairs = sum(segment.query_len * segment.context_len for segment in plan.segments)
        copies = len(plan.evictions) + len(plan.swap_ins)
        return (STEP_S if plan.segments else 0.0) + tokens * TOKEN_S + pairs * CONTEXT_S + copies * SWAP_S

    def run(self) -> None:
        """Until no request is left."""
        while self.core.has_requests:
            plan = self.core.schedule(self.now)
            if self.disk:
                for transfer in self.core.take_transfers():
                    self.disk.begin(transfer, self.now)
            if plan is not None:
                self.wait_until(self.now + self.step_s(plan), is_in_step=True)
                token_ids = tuple(TOKEN_ID for segment in plan.segments if segment.samples)
                self.core.update(plan, StepResult(plan.step_id, token_ids), self.now)
                self.end_transfers()
                continue
            assert self.disk is not None
            self.disk.advance(self.now)
            times = [due for due, *_ in self.disk.ends]
            deadline = self.core.next_deadline_s()
            self.wait_until(min([*times, *([] if deadline is None else [deadline])]))

    def wait_until(self, time_s: float, *, is_in_step: bool = False) -> None:
        """is_in_step: ends of transfers are told after the step."""
        while self.disk and (self.disk.loads or self.disk.stores) and self.disk.free_at_s <= time_s:
            self.disk.advance(max(self.now, self.disk.free_at_s))
        self.now = max(self.now, time_s)
        if not is_in_step:
            self.end_transfers()

    def end_transfers(self) -> None:
        for end in self.disk.take_ended(self.now) if self.disk else ():
            self.core.complete_transfer(end, self.now)


def serve_rounds(
    disk: Disk | None, multiple: int, num_at_once: int = 1, *, has_profile: bool = False
) -> tuple[list[float], list[int], EngineCore]:
    """Seconds of each round of turns of all conversations, and how many tokens it computed.

    num_at_once: so many conversations come at the same time; the fast tiers hold four times as many.
    """
    final_len = CONTEXT_LEN + NUM_ROUNDS * (NUM_NEW_TOKENS + NUM_ANSWER_TOKENS)
    num_chunks = -(-final_len // CHUNK_SIZE)
    engine = VirtualEngine(disk, 2 * num_at_once * num_chunks + num_chunks // 2, has_profile)
    rng = random.Random(0)
    contexts = [rng.choices(range(500), k=CONTEXT_LEN) for _ in range(4 * num_at_once * multiple)]
    seconds, num_computed = [], []
    for number in range(NUM_ROUNDS):
        begin_s, num_before = engine.now, engine.core.stats.num_computed_tokens
        for first in range(0, len(contexts), num_at_once):
            for index in range(first, first + num_at_once):
                context = contexts[index]
                sampling = SamplingParams(temperature=0.0, max_tokens=NUM_ANSWER_TOKENS, ignore_eos=True)
                request = Request(f"{index}.{number}", list(context), sampling, conversation_id=str(index))
                engine.core.add_request(request, engine.now)
                context += [TOKEN_ID] * NUM_ANSWER_TOKENS + rng.choices(range(500), k=NUM_NEW_TOKENS)
            engine.run()
        seconds.append(engine.now - begin_s)
        num_computed.append(engine.core.stats.num_computed_tokens - num_before)
    engine.core.check_integrity()
    return seconds, num_computed, engine.core


def most_late(seconds: Sequence[float], without: Sequence[float]) -> float:
    """How much later, as a share of the time so far, any round has ended than without a disk."""
    ends = zip(accumulate(seconds), accumulate(without), strict=True)
    return max(own_s / other_s for own_s, other_s in ends) - 1


@pytest.mark.parametrize("has_profile", [False, True])
@pytest.mark.parametrize("num_at_once", [1, 4])
@pytest.mark.parametrize("multiple", [1, 2, 4, 8] if IS_NIGHTLY else [1, 2, 4])
def test_a_disk_is_never_slower_than_none(multiple, num_at_once, has_profile):
    """After no round, and not at a speed at which loading takes about as long as computing, some 18 MB/s."""
    without, *_ = serve_rounds(None, multiple, num_at_once, has_profile=has_profile)
    for mb_per_s in (5, 10, 15, 20, 30, 100, 500) if IS_NIGHTLY else (10, 20, 500):
        seconds, *_ = serve_rounds(Disk(mb_per_s * 1e6), multiple, num_at_once, has_profile=has_profile)
        assert most_late(seconds, without) < 0.03, mb_per_s


@pytest.mark.parametrize("num_at_once", [1, 4])
def test_behind_a_fast_disk_hardly_anything_is_computed_again(num_at_once):
    """From the third turn of each conversation on, although the fast tiers hold a quarter of them."""
    _, num_computed, core = serve_rounds(Disk(2e9), 4, num_at_once)
    num_new = 4 * 4 * num_at_once * (NUM_NEW_TOKENS + NUM_ANSWER_TOKENS)
    assert max(num_computed[3:]) < 1.2 * num_new
    assert core.stats.slow_refusals["disk_load"] == 0


@pytest.mark.parametrize("num_fast_rounds", [0, 2])
def test_a_disk_that_becomes_slow_is_left_alone(num_fast_rounds):
    """The first context that is loaded shows the new price, for no more than twice what computing it takes."""
    without, *_ = serve_rounds(None, 4)
    slow_from_s = 1e-3 + sum(without[:num_fast_rounds])  # it was fast when it was measured, at least
    seconds, _, core = serve_rounds(Disk(500e6, slow_from_s=slow_from_s), 4)
    ends = zip(accumulate(seconds), accumulate(without), strict=True)
    assert max(own_s - other_s for own_s, other_s in ends) < 2 * without[0] / 16
    assert core.stats.slow_refusals["disk_load"] > 0
    assert seconds[-2:] == pytest.approx(without[-2:], rel=0.01)
