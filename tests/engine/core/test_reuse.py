"""What requests say of the next use of their context, and what the chunks keep of it."""

import math

import pytest

from engine.core.cache.cache_manager import CacheManager
from engine.core.config import CacheConfig
from engine.core.request import Request, SamplingParams
from engine.core.reuse import MAX_WEIGHT, NO_REUSE, Reuse
from engine.core.stats import EngineStats
from engine.errors import InvalidParameterError


def use(
    cache: CacheManager, token_ids, now: float, conversation: str = "a", reuse: Reuse = NO_REUSE, **options
) -> None:
    """One turn, which ends at `now`."""
    request = Request(f"{conversation}.{now}", token_ids, SamplingParams(), conversation_id=conversation, reuse=reuse)
    assert cache.try_admit(request, 0, now)
    cache.transfers.take()
    cache.transfers.complete()
    for start, end in request.pending:
        cache.commit(request, start, end)
    cache.release(request, now, **options)


def make_cache() -> CacheManager:
    return CacheManager(CacheConfig(chunk_size=4, num_gpu_blocks=16), EngineStats())


def chunks(cache: CacheManager) -> list[tuple[int, Reuse, int, int]]:
    """(position, reuse, uses, users) of all, by position."""
    return [
        (chunk.position, chunk.reuse, chunk.num_uses, chunk.num_users)
        for chunk in sorted(cache.index, key=lambda chunk: chunk.position)
    ]


def test_without_a_statement_nothing_is_known():
    cache = make_cache()
    use(cache, range(5), 1.0)
    assert chunks(cache) == [(0, NO_REUSE, 1, 1), (1, NO_REUSE, 1, 1)]
    assert all(chunk.reuse is NO_REUSE for chunk in cache.index)


def test_times_count_from_the_end_of_the_turn_and_the_last_statement_of_a_conversation_holds():
    cache = make_cache()
    use(cache, range(5), 10.0, reuse=Reuse(3, 60.0, 2.0, 100.0))
    assert chunks(cache)[0] == (0, Reuse(3, 70.0, 2.0, 110.0), 1, 1)
    use(cache, range(9), 20.0, reuse=Reuse(expected_use_s=math.inf))
    never = Reuse(expected_use_s=math.inf)
    assert chunks(cache) == [(0, never, 2, 1), (1, never, 2, 1), (2, never, 1, 1)]


def test_a_shared_chunk_keeps_the_most_useful_statement():
    cache = make_cache()
    use(cache, [0, 1, 2, 3, 10], 10.0, "a", Reuse(1, 60.0, 4.0, 50.0))
    use(cache, [0, 1, 2, 3, 20], 20.0, "b", Reuse(2, math.inf))
    shared, *tails = chunks(cache)
    assert shared == (0, Reuse(2, 70.0, 4.0, 60.0), 2, 2)
    assert {reuse for _, reuse, _, _ in tails} == {Reuse(1, 70.0, 4.0, 60.0), Reuse(2, math.inf)}
    use(cache, [0, 1, 2, 3, 30], 65.0, "c")  # the weight has ended meanwhile, the expected use has not
    assert chunks(cache)[0] == (0, Reuse(0, 70.0), 3, 3)
    use(cache, [0, 1, 2, 3, 20, 21], 75.0, "b", Reuse(2, math.inf))  # nothing says that the others never come
    assert chunks(cache)[0] == (0, Reuse(2), 4, 4)


def test_a_preempted_request_says_nothing_yet():
    cache = make_cache()
    use(cache, range(5), 1.0, reuse=Reuse(5, math.inf), is_preempted=True)
    assert chunks(cache) == [(0, NO_REUSE, 0, 0), (1, NO_REUSE, 0, 0)]


@pytest.mark.parametrize(
    ("older", "newer", "merged"),
    [
        (NO_REUSE, NO_REUSE, NO_REUSE),
        (Reuse(expected_use_s=9.0), Reuse(expected_use_s=8.0), Reuse(expected_use_s=8.0)),
        (Reuse(expected_use_s=9.0), NO_REUSE, Reuse(expected_use_s=9.0)),
        (Reuse(expected_use_s=4.0), Reuse(expected_use_s=8.0), Reuse(expected_use_s=8.0)),  # it should have come
        (Reuse(expected_use_s=math.inf), Reuse(expected_use_s=math.inf), Reuse(expected_use_s=math.inf)),
        (Reuse(expected_use_s=math.inf), NO_REUSE, NO_REUSE),
        (Reuse(weight=0.5), NO_REUSE, NO_REUSE),
        (Reuse(weight=2.0, keep_until_s=5.0), Reuse(weight=0.5), NO_REUSE),  # the other one is as any again
        (
            Reuse(weight=2.0, keep_until_s=6.0),
            Reuse(weight=2.0, keep_until_s=7.0),
            Reuse(weight=2.0, keep_until_s=7.0),
        ),
        (Reuse(weight=2.0), Reuse(weight=2.0, keep_until_s=7.0), Reuse(weight=2.0)),
        (Reuse(7), Reuse(8), Reuse(8)),
    ],
)
def test_what_is_kept_of_two_statements_at_5(older, newer, merged):
    assert older.merged(newer, 5.0) == merged


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"weight": MAX_WEIGHT * 2}, "weight"),
        ({"weight": 0.0}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"reuse_class": -1}, "reuse_class"),
        ({"expected_use_s": math.nan}, "expected_use_s"),
        ({"keep_until_s": math.nan}, "keep_until_s"),
    ],
)
def test_a_statement_that_says_nothing_sensible_is_refused(values, name):
    with pytest.raises(InvalidParameterError, match=name):
        Reuse(**values)
