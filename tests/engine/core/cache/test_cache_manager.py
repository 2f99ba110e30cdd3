"""Which block a context gets, literally: shared, taken over, copied, or new; and whose chunks go for it."""

from engine.core.cache.cache_manager import CacheManager
from engine.core.cache.cost_model import CostModel
from engine.core.cache.transfers import StepTransfers
from engine.core.config import CacheConfig
from engine.core.plan import BlockCopy
from engine.core.request import ContextAccount, Request, SamplingParams
from engine.core.stats import EngineStats
from tests.copies import local_copy, swap_in, swap_out


def make_cache(num_gpu_blocks: int, policy: str = "retention_value", **options) -> CacheManager:
    costs = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4)  # 2, 3, 4, ... for chunks 0, 1, 2, ...
    config = CacheConfig(
        num_gpu_blocks=num_gpu_blocks,
        **{"chunk_size": 4, "eviction_policy": policy, "cost_model": costs, **options},
    )
    return CacheManager(config, EngineStats())


def make_request(name: str, token_ids, conversation: str | None = None, tenant: str = "acme") -> Request:
    return Request(name, token_ids, SamplingParams(), conversation_id=conversation, tenant=tenant)


def blocks(request: Request) -> list[int | None]:
    return [chunk.blocks[0] for chunk in request.chunks]


def compute(cache: CacheManager, request: Request) -> None:
    for start, end in request.pending:
        cache.commit(request, start, end)


def execute(cache: CacheManager) -> StepTransfers:
    """A step whose copies are made."""
    transfers = cache.transfers.take()
    cache.transfers.complete()
    return transfers


def copies(cache: CacheManager) -> tuple[BlockCopy, ...]:
    """A step that has nothing to move between the tiers."""
    transfers = execute(cache)
    assert (transfers.evictions, transfers.swap_ins, transfers.swap_outs) == ([], [], [])
    return tuple(transfers.local_copies)


def use(cache: CacheManager, name: str, token_ids, now: float, conversation: str | None = None, **options) -> Request:
    """Admitted, computed and ended at `now`."""
    request = make_request(name, token_ids, conversation, **options)
    assert cache.try_admit(request, 0, now)
    execute(cache)
    compute(cache, request)
    cache.release(request, now)
    return request


def admit(cache: CacheManager, request: Request, now: float = 9.0) -> tuple[BlockCopy, ...]:
    assert cache.try_admit(request, 0, now)
    cache.check_integrity([request])
    return copies(cache)


def test_a_new_context_gets_blocks_in_order_and_computes_all():
    cache, request = make_cache(4), make_request("a", range(9))
    assert admit(cache, request) == ()
    assert (blocks(request), request.pending) == ([0, 1, 2], [(0, 9)])


def test_the_same_conversation_takes_its_tail_over():
    cache = make_cache(4)
    use(cache, "turn 1", range(6), 1.0, "a")
    turn_2 = make_request("turn 2", range(9), "a")
    assert admit(cache, turn_2) == ()
    assert (blocks(turn_2), turn_2.pending) == ([0, 1, 2], [(6, 9)])


def test_another_conversation_gets_a_copy_of_the_tail_and_shares_what_is_full():
    cache = make_cache(5)
    use(cache, "turn 1", range(6), 1.0, "a")
    fork = make_request("fork", [*range(6), 60, 61, 62], "b")
    assert admit(cache, fork) == (local_copy(1, 2),)
    assert (blocks(fork), fork.pending) == ([0, 2, 3], [(6, 9)])
    own = make_request("turn 2", range(7), "a")
    assert cache.try_admit(own, 0, 9.0)
    assert copies(cache) == ()
    assert (blocks(own), own.pending) == ([0, 1], [(6, 7)])
    cache.check_integrity([fork, own])


def test_a_context_that_is_all_cached_computes_its_last_token_in_a_copy():
    cache = make_cache(4)
    use(cache, "first", range(8), 1.0, "a")
    again = make_request("again", range(8), "a")
    assert admit(cache, again) == (local_copy(1, 2),)
    assert (blocks(again), again.pending) == ([0, 2], [(7, 8)])


def test_a_tail_that_departs_from_the_context_is_not_used():
    cache = make_cache(4)
    use(cache, "turn 1", range(6), 1.0, "a")
    edited = make_request("edited", [0, 1, 2, 3, 4, 50, 60], "a")
    assert admit(cache, edited) == ()
    assert (blocks(edited), edited.pending) == ([0, 2], [(4, 7)])


def test_a_source_evicted_by_its_own_admission_is_copied_all_the_same():
    """The copy is made before anything is written, so the block that the target's neighbour got still holds it."""
    cache = make_cache(3)
    use(cache, "turn 1", range(6), 1.0, "a")
    fork = make_request("fork", [*range(6), 60, 61, 62], "b")  # 3 chunks: 1 shared, 1 free block, the source's block
    assert admit(cache, fork) == (local_copy(1, 2),)
    assert (blocks(fork), fork.pending) == ([0, 2, 1], [(6, 9)])
    assert (cache.allocator._stats.evictions["gpu_dropped"], sum(cache.allocator._stats.evictions.values())) == (1, 1)


def test_holes_are_pending_and_what_lies_behind_them_is_kept():
    cache = make_cache(5)
    use(cache, "other", [70, 71], 0.0)
    use(cache, "turn 1", range(12), 1.0, "a")
    # values at 2: other's tail 2/2, chunk 0 2/1, chunk 1 3/1: one block is free, then these two go
    filler = make_request("filler", range(80, 89))
    assert admit(cache, filler, now=2.0) == ()
    cache.release(filler, 3.0)
    turn_2 = make_request("turn 2", range(13), "a")
    assert admit(cache, turn_2, now=4.0) == ()
    assert turn_2.pending == [(0, 4), (12, 13)]


def test_tenants_never_share():
    cache = make_cache(8)
    use(cache, "theirs", range(9), 1.0, "same id", tenant="umbrella")
    ours = make_request("ours", range(9), "same id", tenant="acme")
    assert cache.match_context(ours).num_cached_tokens == 0
    assert admit(cache, ours) == ()
    assert ours.pending == [(0, 9)]
    assert blocks(ours) == [3, 4, 5]


def test_matching_changes_nothing():
    cache = make_cache(4)
    use(cache, "turn 1", range(6), 1.0, "a")
    match = cache.match_context(make_request("turn 2", range(9), "a"))
    assert (list(match.full), list(match.tails), match.num_cached_tokens) == ([0], [1], 6)
    assert cache.num_available_blocks == 4
    cache.check_integrity([])


def test_no_admission_that_would_cut_into_the_reserve():
    cache = make_cache(6)
    running = make_request("running", range(8))
    assert cache.try_admit(running, 0, 1.0)
    assert copies(cache) == ()
    late = make_request("late", range(50, 62))
    assert not cache.try_admit(late, 2, 1.0)
    assert (blocks(late), late.pending, cache.num_available_blocks) == ([], [], 4)
    assert cache.try_admit(late, 1, 1.0)
    assert copies(cache) == ()
    assert cache.num_available_blocks == 1


def test_cached_chunks_of_the_context_itself_are_no_room_for_it():
    cache = make_cache(4)
    use(cache, "turn 1", range(8), 1.0, "a")
    running = make_request("running", range(50, 58))
    assert cache.try_admit(running, 0, 2.0)
    assert copies(cache) == ()
    assert cache.num_available_blocks == 2  # both are turn 1's, and it needs a third
    turn_2 = make_request("turn 2", range(9), "a")
    assert not cache.try_admit(turn_2, 0, 3.0)
    cache.check_integrity([running])


def test_victims_are_freed_one_by_one_and_only_as_many_as_needed():
    cache = make_cache(4)
    use(cache, "old", range(8), 1.0)
    use(cache, "recent", range(50, 58), 5.0)
    # values at 7: old 2/6, 3/6, recent 2/2, 3/2
    request = make_request("new", range(60, 63))
    assert admit(cache, request, now=7.0) == ()
    assert blocks(request) == [0]
    assert [cache.try_append_block(request, 7.0) for _ in range(4)] == [1, 2, 3, None]
    assert blocks(request) == [0, 1, 2, 3]
    cache.check_integrity([request])


def test_a_shared_chunk_counts_its_last_user():
    """A system prompt in front of two conversations is as recent as the later of them."""
    cache = make_cache(5, "lru")
    use(cache, "a", [1, 2, 3, 4, 10], 1.0)
    use(cache, "b", [1, 2, 3, 4, 20], 5.0)
    newcomer = make_request("new", range(50, 62))  # two free blocks, then the oldest: a's tail, not the shared chunk
    assert admit(cache, newcomer) == ()
    assert blocks(newcomer) == [3, 4, 1]
    assert cache.match_context(make_request("c", [1, 2, 3, 4, 5])).num_cached_tokens == 4


def test_equal_chunks_are_stored_once_when_their_users_are_gone():
    cache = make_cache(8)
    one, two = make_request("one", range(10)), make_request("two", range(10))
    assert cache.try_admit(one, 0, 1.0)
    assert copies(cache) == ()
    assert cache.try_admit(two, 0, 1.0)
    assert copies(cache) == ()
    compute(cache, one)
    compute(cache, two)
    cache.check_integrity([one, two])
    cache.release(one, 2.0)
    cache.release(two, 2.0)
    cache.check_integrity([])
    assert (cache.tiers.primary.pool.num_used, len(cache.index)) == (3, 3)


def test_half_a_prompt_that_was_computed_is_kept():
    cache = make_cache(4)
    request = make_request("aborted", range(12), "a")
    admit(cache, request)
    cache.commit(request, 0, 6)
    cache.release(request, 1.0)
    assert cache.match_context(make_request("again", range(12))).num_cached_tokens == 6
    assert cache.tiers.primary.pool.num_used == 2


def test_after_a_failed_step_only_named_chunks_are_kept():
    cache = make_cache(4)
    request = make_request("failed", range(6), "a")
    admit(cache, request)
    cache.commit(request, 0, 6)
    cache.release(request, 1.0, step_failed=True)
    assert cache.match_context(make_request("again", range(7), "a")).num_cached_tokens == 4
    assert cache.tiers.primary.pool.num_used == 1
    cache.check_integrity([])


def test_stateless_keeps_and_finds_nothing():
    cache = make_cache(4, keep=False)
    use(cache, "turn 1", range(9), 1.0, "a")
    assert cache.tiers.primary.pool.num_free == 4
    turn_2 = make_request("turn 2", range(9), "a")
    admit(cache, turn_2)
    assert turn_2.pending == [(0, 9)]


def test_an_admission_that_is_refused_counts_nothing():
    """Each step asks again, and only the admission itself may be counted. 9 to load is more than 2 to compute."""
    costs = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4, load_costs={"cpu": 9.0})
    cache = make_cache(3, num_cpu_blocks=4, cost_model=costs)
    use(cache, "turn 1", range(4), 1.0, "a")
    running = make_request("running", range(50, 62))
    assert cache.try_admit(running, 0, 2.0)
    execute(cache)
    turn_2 = make_request("turn 2", range(7), "a")
    assert not cache.try_admit(turn_2, 0, 3.0)
    assert turn_2.account == ContextAccount()
    cache.release(running, 4.0)
    assert cache.try_admit(turn_2, 0, 5.0)
    assert turn_2.account == ContextAccount(num_not_loaded_tokens=4)


def test_a_chunk_that_was_evicted_and_on_its_way_back_when_the_step_failed_is_forgotten():
    """The one request's admission evicts it, the next one's in the same plan wants it: its only copy was on its way."""
    cache = make_cache(6, num_cpu_blocks=6)
    use(cache, "turn 1", range(4), 1.0, "a")
    use(cache, "other", range(30, 38), 1.5)
    one, two = make_request("one", range(50, 64)), make_request("two", range(5), "b")
    assert cache.try_admit(one, 0, 2.0)
    assert cache.try_admit(two, 0, 2.0)
    transfers = cache.transfers.take()
    assert [copy for _, copy in transfers.evictions] == [swap_out(0, 0), swap_out(1, 1), swap_out(2, 2)]
    assert [copy for _, _, copy in transfers.swap_ins] == [swap_in(0, 1)]
    cache.transfers.abort(1.0)
    cache.release(one, 3.0, step_failed=True)
    cache.release(two, 3.0, step_failed=True)
    cache.check_integrity([])
    assert (cache.tiers.primary.pool.num_used, cache.tiers.secondary.pool.num_used, len(cache.index)) == (0, 0, 0)
    assert cache.try_admit(make_request("again", range(5), "b"), 0, 4.0)


def test_a_source_that_is_being_loaded_in_the_same_plan_is_copied_from_the_cpu_tier():
    cache = make_cache(6, num_cpu_blocks=6)
    use(cache, "turn 1", range(4), 1.0, "a")
    use(cache, "filler", range(30, 54), 2.0)
    one, two = make_request("one", range(5), "a"), make_request("two", range(4), "b")
    assert cache.try_admit(one, 0, 3.0)
    assert cache.try_admit(two, 0, 3.0)  # all cached, so its last token is computed in a copy
    cache.check_integrity([one, two])
    transfers = execute(cache)
    assert transfers.local_copies == []
    assert [copy.source for _, _, copy in transfers.swap_ins] == [0, 0]
    assert [copy.target for _, _, copy in transfers.swap_ins] == [blocks(one)[0], blocks(two)[0]]
    assert (one.pending, two.pending) == ([(4, 5)], [(3, 4)])


def test_the_cpu_tier_gives_up_spare_copies_first_and_then_only_what_goes_before_the_newcomer():
    cache = make_cache(4, "lru", num_cpu_blocks=2)
    use(cache, "old", range(4), 1.0)
    use(cache, "newer", range(10, 14), 5.0)
    cache.allocator.plan_swap_outs(4, 4, 6.0)
    assert [copy for _, copy in execute(cache).swap_outs] == [swap_out(0, 0), swap_out(1, 1)]
    use(cache, "newest", range(20, 28), 7.0)
    assert cache.count_idle_chunks() == {"gpu": 2, "both": 2, "cpu": 0}

    running = make_request("running", [*range(4), 8])
    assert cache.try_admit(
        running, 0, 8.0
    )  # pins old's chunk, which is on the GPU: its copy is spare; reclaims newer's block
    assert blocks(running) == [0, 1]
    assert cache.try_append_block(running, 8.0) == 2  # newest's first chunk takes the spare copy's block
    assert [copy for _, copy in execute(cache).evictions] == [swap_out(2, 0)]
    assert cache.try_append_block(running, 8.0) == 3  # its second takes that of newer, which goes before it
    assert [copy for _, copy in execute(cache).evictions] == [swap_out(3, 1)]
    cache.check_integrity([running])
    assert cache.allocator._stats.evictions == {
        "gpu_reclaimed": 1,
        "gpu_swapped_out": 2,
        "gpu_dropped": 0,
        "cpu_dropped": 1,
        "cpu_copy_dropped": 1,
    }


def test_what_goes_before_everything_in_a_full_cpu_tier_is_dropped():
    cache = make_cache(3, "trailing_lru", num_cpu_blocks=1)
    use(cache, "newer", range(4), 5.0)
    cache.allocator.plan_swap_outs(3, 3, 5.0)
    assert execute(cache).swap_outs
    use(cache, "old", range(10, 14), 1.0)
    running = make_request("running", range(50, 58))
    assert cache.try_admit(running, 0, 9.0)  # a free block, and the reclaimed one of newer's chunk
    assert cache.try_append_block(running, 9.0) is not None
    transfers = execute(cache)
    assert transfers.evictions == []
    assert cache.allocator._stats.evictions["gpu_dropped"] == 1
    assert cache.match_context(make_request("again", range(5))).num_cached_tokens == 4
    assert cache.match_context(make_request("lost", range(10, 15))).num_cached_tokens == 0


def test_write_through_without_a_cpu_tier_remembers_nothing():
    cache = make_cache(4, write_through=True)
    use(cache, "turn 1", range(9), 1.0)
    assert not cache.allocator._unwritten
