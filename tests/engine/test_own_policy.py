"""An eviction policy from outside, by its import path."""

from typing import ClassVar

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import LRU, EvictionPolicy
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.plan import StepResult
from engine.core.request import Request, SamplingParams
from engine.core.reuse import Reuse
from engine.errors import ConfigError
from engine.own_policy import load_policy


class NewestFirst(LRU):
    """The opposite of LRU."""

    def __init__(self, cost_model: CostModel) -> None:
        super().__init__()
        self.cost_model = cost_model

    @staticmethod
    def _rank(chunk):
        return -chunk.last_active, chunk.position


def cached_after_three_turns(own_policy) -> list[bool]:
    """Whether each of three contexts of one chunk is found, when there was room for two of them."""
    core = EngineCore(
        CacheConfig(chunk_size=4, num_gpu_blocks=3, own_policy=own_policy),
        SchedulingConfig(max_model_len=12, decode_reserve=0.0),
    )
    for now, first in enumerate((10, 20, 30)):
        core.add_request(Request(f"r{first}", range(first, first + 4), SamplingParams(max_tokens=1)), now)
        plan = core.schedule(now)
        core.update(plan, StepResult(plan.step_id, (1,)), now)
    held = Request("held", range(50, 54), SamplingParams(max_tokens=1))
    core.add_request(held, 3.0)
    core.schedule(3.0)
    found = []
    for first in (10, 20, 30):
        request = Request(f"again{first}", [*range(first, first + 4), 1], SamplingParams(max_tokens=1))
        found.append(bool(core._cache.match_context(request).num_cached_tokens))
    return found


def test_what_it_chooses_goes():
    assert cached_after_three_turns(None) == [False, True, True]
    assert cached_after_three_turns(NewestFirst) == [True, True, False]


def test_one_that_learns_is_told_of_requests_and_all_tiers_learn_from_the_same():
    """Starts and ends of requests; what it stamps is what the chunks keep."""
    told: list[tuple[str, str]] = []

    class Notes:
        def stamp(self, request):
            told.append(("stamp", request.request_id))
            return Reuse(7)

        def note_end(self, request, now):
            told.append(("end", request.request_id))
            assert [(chunk.num_uses, chunk.reuse) for chunk in request.chunks] == [(1, Reuse(7))]

        def note_start(self, request, now):
            told.append(("start", request.request_id))

    class Learning(LRU):
        LEARNS_FROM = Notes
        made: ClassVar[list] = []

        def __init__(self, cost_model, notes):
            super().__init__()
            self.made.append(notes)

    assert cached_after_three_turns(Learning) == [False, True, True]
    turns = [[("start", name), ("stamp", name), ("end", name)] for name in ("r10", "r20", "r30")]
    assert told == [*turns[0], *turns[1], *turns[2], ("start", "held")]
    assert len(Learning.made) > 1
    assert len({id(notes) for notes in Learning.made}) == 1


def test_it_is_found_by_its_path_and_named_ones_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "a_policy_of_mine.py").write_text(
        "from engine.core.cache.eviction import LRU\n\nclass Mine(LRU):\n    def __init__(self, cost_model):\n"
        "        super().__init__()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    factory = load_policy("a_policy_of_mine:Mine")
    assert factory is not None
    policy: EvictionPolicy = factory(CostModel())
    assert (len(policy), policy.choose_victim(1.0)) == (0, None)
    assert load_policy("lru") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.policies:Mine", "cannot be loaded: No module named"),
        ("engine.core.cache.eviction:Mine", "cannot be loaded: module"),
        ("engine.core.cache.cost_model:CostModel", "has no insert"),
        ("engine.core.cache.eviction:LRU", "cannot be loaded: LRU"),
    ],
)
def test_what_cannot_be_used_is_told(name, message):
    with pytest.raises(ConfigError, match=message) as raised:
        load_policy(name)
    assert raised.value.param == "eviction_policy"
