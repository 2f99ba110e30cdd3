"""The thesis with chunks of another engine: greedy output is that of the stateless mode.

They come at any time, out of order, badly or not at all, from an engine that computes, swaps and evicts meanwhile.
"""

from __future__ import annotations

import random

import pytest

from engine.core.request import SamplingParams
from engine.core.tier_table import PEER
from engine.step_loop import LookAhead
from tests.delayed_tier import NAME, dict_tier
from tests.engine.test_two_tiers import FAMILIES, WINDOW, count_ties, run_conversations
from tests.nightly import IS_NIGHTLY
from tests.peer_double import connect, peer_tier

CASES = [
    (family, with_disk, LookAhead.LAUNCH if with_disk else LookAhead.DRAFT)
    for family in (FAMILIES if IS_NIGHTLY else FAMILIES[:1])
    for with_disk in (True, False)
    if IS_NIGHTLY or with_disk
]


class Twins:
    """Two drivers. The second one is asked a part of what the first one is, before it or after, and steps with it."""

    def __init__(self, first, second, rng: random.Random) -> None:
        self.first, self.second = first, second
        self._rng = rng
        self._num_asked = self._num_offers = 0
        self._add, self._step = first.add, first.step
        first.add, first.step = self.add, self.step

    def add(self, request_id: str, prompt, conversation_id, sampling) -> None:
        if self._rng.random() < 0.5 and len(self.second.core._requests) < 4:
            self._num_asked += 1
            self.second.add(
                f"{request_id}.{self._num_asked}", prompt[: self._rng.randint(1, len(prompt))], conversation_id
            )
            for _ in range(self._rng.choice([0, 3, 30])):
                self.second.step()
        if self._rng.random() < 0.1:
            ends = self.second.peers, self.first.peers
            source, target = ends if self._rng.random() < 0.5 else ends[::-1]
            self._num_offers += 1
            source.offer(target, f"offer {self._num_offers}", prompt, conversation_id, "local")
        self._add(request_id, prompt, conversation_id, sampling)

    def step(self, *arguments):
        self.second.step()
        self.second.core.check_integrity()
        if self._rng.random() < 0.1:
            self._rng.choice([self.first, self.second]).peers.wake()
        return self._step(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "with_disk", "look_ahead"), CASES)
def test_chunks_of_peers_equal_stateless(family, with_disk, look_ahead, tiny_model, make_driver):
    rng = random.Random(f"{family} {with_disk}")
    options = {"chunk_size": 8, "max_num_batched_tokens": 64, "max_num_seqs": 6, "max_model_len": WINDOW}
    slow_tiers = (*([dict_tier(150)] if with_disk else []), peer_tier(200))
    kept, other = (
        make_driver(
            tiny_model(family),
            num_gpu_blocks=40,
            num_cpu_blocks=60,
            slow_tiers=slow_tiers,
            decode_reserve=0.02,
            **options,
        )
        for _ in range(2)
    )
    connect([kept.peers, other.peers])
    fresh = make_driver(tiny_model(family), num_gpu_blocks=250, mode="stateless", **options)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2)
    kept.loop.look_ahead = look_ahead
    Twins(kept, other, rng)
    prompts = run_conversations(kept, rng, sampling)

    assert count_ties(kept, fresh, prompts, sampling) <= len(prompts) // 50
    stats = kept.core.get_statistics()
    for driver in (kept, other):
        outcomes = driver.core.stats.slow_transfers
        assert min(outcomes[f"{PEER}_{what}"] for what in ("loaded", "sent", "load_failed", "load_gone")) > 0, outcomes
    assert stats[f"num_{PEER}_cached_tokens"] > 0
    assert stats[f"num_{NAME}_cached_tokens"] > 0 or not with_disk
    assert min(stats["num_aborted"], stats["num_suspensions"], stats["num_swap_ins"]) > 0
