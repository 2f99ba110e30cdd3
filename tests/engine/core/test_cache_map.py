"""What the map of the cache shows, exactly, on tiny numbers; and tiers that are made smaller."""

from engine.core.cache.cache_manager import CacheManager
from engine.core.cache_map import MAX_EVICTIONS, WATCH_S, Cell, context_keys
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.request import Request
from tests.engine.core.cache.test_cache_manager import blocks, compute, execute, make_cache, make_request, use

A = tuple(range(10))  # two full chunks and a tail of two
B = tuple(range(20, 28))


def cells(cache: CacheManager, token_ids: tuple[int, ...], now: float, tenant: str = "acme") -> list[Cell]:
    keys = context_keys(token_ids, model="", tenant=tenant, chunk_size=4, max_chunks=8)
    return cache.map.map_context(keys, now)


def evictions(cache: CacheManager) -> list[tuple[str, int, float, float | None]]:
    """Reason, position, idle time and retention value, the oldest first."""
    latest = reversed(cache.eviction_log.latest())
    return [(e.reason, e.position, e.idle_s, e.retention_value) for e in latest]


def test_an_idle_context() -> None:
    """Costs are 2, 3 and 4: what a chunk is worth is that over its idle time."""
    cache = make_cache(8)
    use(cache, "a", A, 10.0)
    assert cells(cache, A, 12.0) == [Cell("gpu", 4, 2.0, 1.0), Cell("gpu", 4, 2.0, 1.5), Cell("gpu", 2, 2.0, 2.0)]
    assert cells(cache, A, 10.0)[0] == Cell("gpu", 4, 0.0, None)
    # A context that goes on has the same chunks and, so far, not the rest; another tenant has none of them.
    assert [cell.state for cell in cells(cache, (*A, *range(90, 95)), 12.0)] == ["gpu", "gpu", "dropped", "dropped"]
    assert [cell.state for cell in cells(cache, A, 12.0, tenant="other")] == ["dropped"] * 3


def test_the_last_chunk_is_found_as_far_as_it_was_computed() -> None:
    cache = make_cache(8)
    use(cache, "a", A, 10.0)
    assert cells(cache, (*A, 99), 12.0)[2] == Cell("gpu", 2, 2.0, 2.0)
    assert cells(cache, (*A[:9], 98), 12.0)[2] == Cell("dropped", 2)
    # A turn's last token is sampled, and not computed: it begins no chunk, and the chunk that it ends is there without it.
    use(cache, "b", B, 10.0)
    use(cache, "c", B[:7], 10.0, tenant="other")
    assert cells(cache, (*B, 99), 12.0) == [Cell("gpu", 4, 2.0, 1.0), Cell("gpu", 4, 2.0, 1.5)]
    assert cells(cache, B, 12.0, tenant="other") == [Cell("gpu", 4, 2.0, 1.0), Cell("gpu", 3, 2.0, 1.5)]
    assert cells(cache, (), 12.0) == []


def test_only_so_many_chunks() -> None:
    keys = context_keys(tuple(range(100)), model="", tenant="acme", chunk_size=4, max_chunks=3)
    assert (len(keys.full), keys.tails, keys.num_chunks) == (3, (), 25)


def test_chunks_on_their_way_between_the_tiers() -> None:
    cache = make_cache(4, num_cpu_blocks=4)
    use(cache, "a", A[:8], 1.0)
    cache.allocator.plan_swap_outs(4, 2, 2.0)  # two blocks are free: two are copied ahead of time
    assert cells(cache, A[:8], 2.0) == [Cell("storing", 4), Cell("storing", 4)]
    execute(cache)
    assert [cell.state for cell in cells(cache, A[:8], 2.0)] == ["both", "both"]
    use(cache, "b", (*B, *range(30, 38)), 3.0)  # takes the whole GPU tier
    assert cells(cache, A[:8], 5.0) == [Cell("cpu", 4, 4.0, 0.5), Cell("cpu", 4, 4.0, 0.75)]
    back = make_request("c", (*A[:8], 50))
    assert cache.try_admit(back, 0, 6.0)
    assert cache.map.map_row(back, 8, 6.0) == [Cell("loading", 4), Cell("loading", 4), Cell("computing", 0)]
    execute(cache)
    compute(cache, back)
    back.pending = []
    assert [cell.state for cell in cache.map.map_row(back, 8, 6.0)] == ["both", "both", "gpu"]


def test_a_running_request_shows_what_is_still_to_be_computed() -> None:
    cache = make_cache(8)
    use(cache, "a", A[:8], 1.0)
    request = make_request("b", (*A, 11, 12))
    assert cache.try_admit(request, 0, 2.0)
    assert cache.map.map_row(request, 8, 2.0) == [Cell("gpu", 4), Cell("gpu", 4), Cell("computing", 0)]
    assert cache.map.map_row(request, 2, 2.0) == [Cell("gpu", 4), Cell("gpu", 4)]
    compute(cache, request)
    request.token_ids.append(13)  # sampled; the chunk that it begins gets its block with the next step
    request.pending = [(12, 13)]
    assert cache.map.map_row(request, 8, 2.0) == [Cell("gpu", 4)] * 3 + [Cell("computing", 0)]


def test_evictions_are_noted_while_somebody_watches() -> None:
    cache = make_cache(2, num_cpu_blocks=1)
    use(cache, "a", A[:8], 0.0)
    use(cache, "b", B, 2.0)
    assert evictions(cache) == []
    cache.eviction_log.watch(3.0)
    use(cache, "c", A[:8], 4.0)
    use(cache, "d", B, 4.0 + WATCH_S)
    # The CPU tier's block is being read, so what goes for `c` is dropped; and there is no watcher any more when `d` comes.
    assert evictions(cache) == [("gpu_dropped", 0, 2.0, 1.0), ("gpu_dropped", 1, 2.0, 1.5)]
    cache.eviction_log.watch(4.0 + WATCH_S)  # a gap would be behind what was noted before
    assert evictions(cache) == []


def test_the_log_is_bounded() -> None:
    cache = make_cache(1)
    for now in range(3 * MAX_EVICTIONS):
        cache.eviction_log.watch(float(now))
        use(cache, f"r{now}", (now, now, now), float(now))
    log = cache.eviction_log.latest()
    assert [eviction.number for eviction in log] == list(range(3 * MAX_EVICTIONS - 1, 2 * MAX_EVICTIONS - 1, -1))


# -- tiers that are made smaller ---------------------------------------------------------------------------------------


def test_what_lies_in_blocks_that_are_held_back_is_evicted_in_the_order_of_its_value() -> None:
    cache = make_cache(8, num_cpu_blocks=8)
    use(cache, "a", A[:8], 0.0)
    use(cache, "b", B, 5.0)
    cache.eviction_log.watch(10.0)
    cache.allocator.hold_back({"gpu": 6, "cpu": 7}, 10.0)
    assert cache.count_held_blocks() == {"gpu": 6, "cpu": 7}
    assert evictions(cache) == [("gpu_swapped_out", 0, 10.0, 0.2), ("gpu_dropped", 1, 10.0, 0.3)]
    cache.check_integrity([])
    execute(cache)
    assert [cell.state for cell in cells(cache, A[:8], 10.0)] == ["cpu", "dropped"]
    assert [cell.state for cell in cells(cache, B, 10.0)] == ["gpu", "gpu"]
    cache.allocator.hold_back({"gpu": 0, "cpu": 0}, 11.0)
    assert cache.count_held_blocks() == {"gpu": 0, "cpu": 0}
    assert (cache.tiers.primary.pool.num_free, cache.tiers.secondary.pool.num_free) == (6, 7)
    cache.check_integrity([])


def test_a_request_gets_the_blocks_that_it_needs_and_leaves_them_held_back() -> None:
    cache = make_cache(4)
    cache.allocator.hold_back({"gpu": 4, "cpu": 0}, 0.0)
    request = make_request("a", A)
    assert cache.try_admit(request, 0, 1.0)
    assert len(blocks(request)) == 3
    assert cache.count_held_blocks() == {"gpu": 1, "cpu": 0}
    cache.check_integrity([request])
    compute(cache, request)
    cache.release(request, 2.0)
    assert cache.count_held_blocks() == {"gpu": 4, "cpu": 0}
    cache.check_integrity([])
    assert [cell.state for cell in cells(cache, A, 3.0)] == ["dropped"] * 3


def test_pinned_blocks_are_held_back_when_they_are_no_longer() -> None:
    cache = make_cache(4)
    request = make_request("a", A)
    assert cache.try_admit(request, 0, 0.0)
    cache.allocator.hold_back({"gpu": 3, "cpu": 0}, 1.0)
    assert cache.count_held_blocks() == {"gpu": 1, "cpu": 0}
    compute(cache, request)
    cache.release(request, 2.0)
    assert cache.count_held_blocks() == {"gpu": 3, "cpu": 0}
    assert [cell.state for cell in cells(cache, A, 3.0)] == ["dropped", "dropped", "gpu"]
    cache.check_integrity([])


# -- the core ----------------------------------------------------------------------------------------------------------


def test_conversations_by_status() -> None:
    core = EngineCore(CacheConfig(num_gpu_blocks=4, chunk_size=4), SchedulingConfig(max_model_len=16, max_num_seqs=1))
    sampling = make_request("", ()).sampling
    for name in ("first", "second"):
        core.add_request(Request(name, A, sampling, conversation_id=name, tenant="acme"), 1.0)
    core.schedule(1.0)
    assert core.live_conversations(8) == [("first", "acme"), ("second", "acme")]
    assert core.live_conversations(1) == [("first", "acme")]
    keys = context_keys(B, model="", tenant="acme", chunk_size=4, max_chunks=8)
    mapped = core.map_contexts({"first": None, "second": keys, "third": keys, "fourth": None}, 2, 1.0)
    assert mapped["first"].status == "running"
    assert (mapped["first"].num_chunks, mapped["first"].cells) == (3, (Cell("computing", 0),) * 2)
    assert (mapped["second"].status, mapped["second"].cells) == ("waiting", (Cell("dropped", 4),) * 2)
    assert (mapped["third"].status, mapped["third"].keys) == ("idle", (*keys.full, *(key for _, key in keys.tails)))
    assert "fourth" not in mapped
