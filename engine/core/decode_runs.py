"""Several steps at once, if all that they do is foreseen: every running request gets one more token in each of them.

For drivers that execute no plans, such as a simulator. What such a run leaves behind is what the same steps leave that are
scheduled one by one: tokens, names of chunks, evictions at their times, counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from engine.core.cache.cache_manager import CacheManager
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.core.stats import EngineStats


class DecodeRun(NamedTuple):
    """Steps that only decode.

    num_steps: how many of them are foreseen; 0 = the next one has to be scheduled.
    num_requests: that each of them computes a token of.
    context_len: the tokens that those of the first step attend to, all together; `num_requests` more in each further one.
    """

    num_steps: int = 0
    num_requests: int = 0
    context_len: int = 0


class DecodeRuns:
    """Foresees runs of steps that only decode, and applies them."""

    def __init__(self, scheduler: Scheduler, cache: CacheManager, stats: EngineStats) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._stats = stats

    def foresee(self) -> DecodeRun:
        """The next steps, as far as they are foreseen; nothing changes.

        They are foreseen until one makes a request reach its length; until one needs a block that is not to be had without a
        copy, or a suspension; or until one would copy blocks ahead of time.
        """
        scheduler, cache = self._scheduler, self._cache
        running = scheduler.running
        num_blocks = scheduler.count_blocks_until_copies()
        if not running or num_blocks is None or not scheduler.starts_none_before_one_ends():
            return DecodeRun()
        if cache.tiers.slow and cache.prices.learns_from(len(running)):
            return DecodeRun()
        num_steps, context_len = running[0].max_total_tokens, 0
        for request in running:
            num_tokens = len(request.token_ids)
            if request.stop_token_ids or num_tokens <= request.num_prompt_tokens:
                return DecodeRun()
            if request.pending[0][0] != num_tokens - 1:
                return DecodeRun()
            context_len += num_tokens
            num_left = request.max_total_tokens - num_tokens
            if num_left < num_steps:
                num_steps = num_left
        return DecodeRun(self._limit_to_blocks(running, num_steps, num_blocks), len(running), context_len)

    def _limit_to_blocks(self, running: Sequence[Request], num_steps: int, num_blocks: int) -> int:
        """The most steps, up to `num_steps`, for which the requests need no more than so many new blocks."""
        size = self._cache.chunk_size
        # A request needs its first block in the step with this number, and one after each `size` further steps.
        firsts = [len(request.chunks) * size - len(request.token_ids) + 1 for request in running]

        def fits(num: int) -> bool:
            return sum(-((first - num) // size) for first in firsts if first < num) <= num_blocks

        if fits(num_steps):
            return num_steps
        low = 0
        while low + 1 < num_steps:
            middle = (low + num_steps) // 2
            if fits(middle):
                low = middle
            else:
                num_steps = middle
        return low

    def advance(
        self, times: Sequence[float], next_tokens: Callable[[Request, int], Sequence[int]]
    ) -> Iterator[Request]:
        """Apply as many steps as there are times, less one; see EngineCore.advance.

        Gives each request that has reached its length, to be ended before the next one is asked for.
        """
        cache, size, num_steps = self._cache, self._cache.chunk_size, len(times) - 1
        running = list(self._scheduler.running)
        # (time, whether it is a block that is needed, number of the request), in the order in which the steps do it: a step
        # ends, which names the chunks that it has filled, before the next one begins, which takes blocks.
        events: list[tuple[int, bool, int]] = []
        for number, request in enumerate(running):
            num_tokens = len(request.token_ids)
            num_filled = -num_tokens % size + 1
            if num_filled < num_steps:
                events += [(step, False, number) for step in range(num_filled, num_steps, size)]
            first_block = len(request.chunks) * size - num_tokens + 1
            if first_block < num_steps:
                events += [(step, True, number) for step in range(first_block, num_steps, size)]
            tokens = next_tokens(request, num_steps)
            assert len(tokens) == num_steps, (len(tokens), num_steps)
            request.token_ids += tokens
            request.pending = [(num_tokens + num_steps - 1, num_tokens + num_steps)]
            request.num_computed_tokens += num_steps
            self._scheduler.waiting.charge_steps(request, num_steps)
        events.sort()
        self._stats.num_steps += num_steps
        self._stats.num_computed_tokens += num_steps * len(running)
        self._stats.num_output_tokens += num_steps * len(running)
        self._scheduler.skip_steps(num_steps)
        for step, needs_block, number in events:
            request = running[number]
            if needs_block:
                block_id = cache.try_append_block(request, times[step])
                assert block_id is not None, "the blocks were counted"
            else:
                end = request.num_tokens - num_steps + step - 1
                cache.commit(request, end - 1, end)
        for request in running:
            num_tokens = len(request.token_ids)
            cache.commit(request, num_tokens - 2, num_tokens - 1)
            if num_tokens >= request.max_total_tokens:
                yield request
