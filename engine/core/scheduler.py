"""Decides what each step computes.

There is no prefill or decode phase, only tokens still to compute under one token budget. Owns the waiting, loading and
running requests; asks the cache manager for room, never looks into a chunk.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.core.cache.cache_manager import CacheManager
from engine.core.config import SchedulingConfig
from engine.core.fair_shares import FairShares
from engine.core.phases import Phase
from engine.core.plan import BlockAppend, QuerySegment, RequestStart, StepPlan
from engine.core.request import Request, RequestStatus, without_front
from engine.core.speculation import Speculation, SpeculativeOptions
from engine.core.stats import EngineStats
from engine.core.waiting_queue import WaitingQueue

# Positions of prompts whose logits a step gives: each is a row of the whole vocabulary.
MAX_SCORED_ROWS = 256
# Of a context that is only prepared, in one step: a request that arrives meanwhile waits for the end of that.
BACKGROUND_STEP_TOKENS = 64


@dataclass(slots=True)
class _Loading:
    """What a request waits for that is being loaded from slow tiers.

    status: what it is again afterwards. transfer_ids: those that have not ended.
    """

    status: RequestStatus
    transfer_ids: set[int]


@dataclass(slots=True)
class _Draft:
    """What running requests compute in a step. Holds as long as the running requests are exactly those of `running`.

    budget: what is left of the step's; num_scorable, of the positions that may say how probable the tokens behind them are.
    num_prompt_tokens: of the segments that are no decodes. growing: those of the
    requests that need one more block for it.
    """

    budget: int
    num_scorable: int
    num_prompt_tokens: int = 0
    segments: list[QuerySegment] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    growing: list[Request] = field(default_factory=list)


class Scheduler:
    """First come, first served within a tenant, weighted fair between tenants.

    That holds for whose turn it is to start (WaitingQueue), and for what the running requests use (FairShares).
    `running` is in order of admission; `loading` are the requests that wait for slow tiers, outside of the queue.
    `background` are those that only prepare a context (Request.is_prewarm): one of them runs while no other request runs or
    waits, and is suspended as soon as one does.

    No request waits for ever: the oldest running request is never suspended for another one, every request fits the primary
    tier alone (the engine core refuses those that do not), no request is admitted before the one whose turn it is, and
    none waits for a slow tier for longer than that tier's `max_wait_s`. If the request whose turn it is finds no place or no
    blocks because other tenants use more than their shares, their newest requests are suspended for it, no more of
    them than it takes, and it is admitted in the same step.
    """

    def __init__(self, config: SchedulingConfig, cache: CacheManager, stats: EngineStats) -> None:
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self.loading: dict[Request, _Loading] = {}
        self.background: deque[Request] = deque()
        self._config = config
        self._cache = cache
        self._shares = FairShares(config.max_num_seqs, cache.num_blocks)
        self._stats = stats
        # Beyond some size, step time grows in proportion to the tokens: a larger batch of prompts adds latency but no
        # throughput, and requests that start together also end together and collide again at their next turns.
        self._prefill_batch_tokens = config.prefill_batch_tokens or config.max_num_batched_tokens
        self._reserve_blocks = math.ceil(config.decode_reserve * cache.num_blocks)
        self._watermark_blocks = math.ceil(cache.config.swap_out_watermark * cache.num_blocks)
        self._ended: list[str] = []
        self._step_id = 0
        self._ahead: _Draft | None = None
        # The last request that was not admitted because running requests hold the blocks; None once one of them ends. And
        # whether a prompt was computed then, which may have been the beginning of its own.
        self._refused: Request | None = None
        self._is_prompt_computed = False
        self._speculation: Speculation | None = None
        if config.speculative is not None:
            options = SpeculativeOptions(**config.speculative)  # checked by the engine's config
            self._speculation = Speculation(options, config.max_num_seqs, keeps_answers=cache.keep)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        if request.is_prewarm:
            self.background.append(request)
            return
        self.waiting.append(request, {other.tenant for other in (*self.running, *self.loading)})

    def remove(self, request: Request, now: float, *, step_failed: bool = False) -> None:
        """Take a request out, wherever it is; its blocks go back to the cache."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._end(request, now, step_failed)
        elif request.status is RequestStatus.LOADING:
            del self.loading[request]
        else:
            self._take_out(request)
        self._expect_no_more(request)
        if self._speculation is not None:
            self._speculation.end(request)

    def _take_out(self, request: Request) -> None:
        (self.background if request.is_prewarm else self.waiting).remove(request)

    def _expect_no_more(self, request: Request) -> None:
        if self._cache.handover is not None:
            self._cache.handover.forget(request.request_id)

    def forget_step(self, plan: StepPlan) -> None:
        """The executor failed at `plan`: tell it again, next time, which requests have ended."""
        self._ended = [*plan.ended, *self._ended]

    def draft_ahead(self, plan: StepPlan) -> None:
        """Draft the step after `plan`, which is being executed. Changes nothing else."""
        if _has_guesses(plan):
            return  # how many tokens they give is not foreseen
        draft = self._draft(plan)
        self._ahead = draft if draft.running else None

    def schedule_ahead(self, executing: StepPlan, now: float) -> StepPlan | None:
        """The step after `executing`, which has no result yet: what running requests compute if nothing unforeseen happens.

        None, and no more than a draft is made, if a request may be started or has to be suspended, or there are guesses that
        are worth to be verified: that waits for the result.
        """
        self._end_late_loading(now)  # one that no longer waits may be started
        if _has_guesses(executing):
            return None
        draft = self._draft(executing)
        if (
            not draft.segments
            or self._may_admit_after(executing, draft)
            or len(draft.growing) > self._cache.num_available_blocks
            or (self._speculation is not None and self._guess(draft))
        ):
            self._ahead = draft if draft.running else None
            return None
        self._take_in_prompts(draft, draft.running)
        self._stats.num_steps_ahead += 1
        return self._make_plan(draft, [], self._append_blocks(draft.growing, now), now)

    def _may_admit_after(self, executing: StepPlan, draft: _Draft) -> bool:
        """Whether the request whose turn it is may be admitted behind `executing`.

        While as many run as may it is not, unless others have to give way to it. Nor is one that was refused for lack
        of blocks, as long as no request ends and no prompt is computed that may be the beginning of its own.
        """
        request = self.waiting.peek()
        if request is None:
            return False
        if self._has_to_make_way:
            return True
        is_same = len(draft.running) == len(self.running) and all(s.token_ids is None for s in executing.segments)
        if len(draft.running) == self._config.max_num_seqs or (is_same and request is self._refused):
            return bool(self._choose_to_give_way(request))
        return True

    @property
    def _has_to_make_way(self) -> bool:
        """Whether the running request only prepares a context, and another one is there."""
        return bool(self.running) and self.running[0].is_prewarm and bool(len(self.waiting) or self._is_any_loading)

    @property
    def _is_any_loading(self) -> bool:
        return any(not request.is_prewarm for request in self.loading)

    def _whose_turn(self) -> Request | None:
        request = self.waiting.peek()
        if request is None and self.background and not self.running and not self._is_any_loading:
            return self.background[0]
        return request

    # -- loading from slow tiers ---------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn, or for what is being loaded for them."""
        return len(self.waiting) + len(self.loading)

    @property
    def num_waiting_tokens(self) -> int:
        """The tokens of these requests."""
        # Of a copy, because statistics are asked for from other threads.
        return self.waiting.num_tokens + sum(request.num_tokens for request in tuple(self.loading))

    def end_transfer(self, transfer_id: int, now: float) -> None:
        """A slow transfer has ended: the requests that waited for nothing else are next again."""
        for request, loading in list(self.loading.items()):
            loading.transfer_ids.discard(transfer_id)
            if not loading.transfer_ids:
                self._end_loading(request, now)

    def _end_late_loading(self, now: float) -> None:
        for request in list(self.loading):
            if request.load_deadline_s is None or now >= request.load_deadline_s:
                self._end_loading(request, now)

    def _end_loading(self, request: Request, now: float) -> None:
        request.status = self.loading.pop(request).status
        is_suspended = request.status is RequestStatus.SUSPENDED
        request.phases.enter(Phase.SUSPENDED if is_suspended else Phase.QUEUE, now)
        if request.is_prewarm:
            self.background.appendleft(request)
        else:
            self.waiting.put_back_in_order(request)
        self._refused = None

    def _try_start_loading(self, request: Request, now: float) -> bool:
        """Let the request whose turn it is wait for what slow tiers have of its context, outside of the queue.

        No more of them than may run: they fill the queue of other tenants too, and are never shed.
        """
        if len(self.loading) >= self._config.max_num_seqs:
            return False
        if request.load_deadline_s is not None and now >= request.load_deadline_s:
            return False
        wait = self._cache.start_loads(request, now)
        if wait is None:
            return False
        if request.load_deadline_s is None:
            request.load_deadline_s = now + wait.max_wait_s
        self._take_out(request)
        self.loading[request] = _Loading(request.status, wait.transfer_ids)
        request.status = RequestStatus.LOADING
        request.phases.enter(Phase.LOAD, now)
        return True

    # -- steps ---------------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, decodes first, then what prompts the budget still holds; None if there is nothing to do.

        It is the same whether it was drafted ahead or not.
        """
        # Whatever unforeseen happens to a running request (it ends, fails, is aborted or has to start again) takes it out of
        # the running ones. So where those are the foreseen ones, the step did for each what was foreseen.
        self._end_late_loading(now)
        if self._has_to_make_way:
            self._put_back(self.running[0], now, step_failed=False)
        ahead, self._ahead = self._ahead, None
        draft = ahead if ahead is not None and ahead.running == self.running else self._draft()
        appends = self._append_blocks(draft.growing, now)
        starts: list[RequestStart] = []
        if len(self.running) < len(draft.running):
            # A request that was just suspended must not take back the blocks that it gave up, so none is admitted.
            draft = self._draft()
        else:
            draft, starts = self._admit(draft, now)
        # Of those that got a block, some may have been suspended since.
        running = {request.request_id for request in self.running} if appends else ()
        appends = [append for append in appends if append.request_id in running]
        if ahead is not None:
            self._stats.num_used_drafts += draft is ahead
            self._stats.num_discarded_drafts += draft is not ahead
        self._take_in_prompts(draft, self.running)
        if self._speculation is not None and not starts:
            appends += self._add_guesses(draft, now)
        self._is_prompt_computed = draft.num_prompt_tokens > 0
        # A lone request always fits: only running requests and in-flight transfers hold pins, and those end with their step.
        assert draft.segments or not (self.running or self.waiting), "requests but nothing to compute"
        return self._make_plan(draft, starts, appends, now)

    def _take_in_prompts(self, draft: _Draft, running: Sequence[Request]) -> None:
        """Have a step that computes prompts index them, so that their first decodes have guesses.

        running: those of the step, with the ones that begin in it.
        """
        if self._speculation is not None and draft.num_prompt_tokens and not running[0].is_prewarm:
            self._speculation.take_in_prompts(running)

    def _guess(self, draft: _Draft) -> dict[Request, tuple[int, ...]]:
        """The guesses that a step is to verify; none beside prompts, whose rows cost as much as their tokens."""
        if self._speculation is None or draft.num_prompt_tokens or not draft.running or draft.running[0].is_prewarm:
            return {}
        if len(draft.segments) < len(draft.running):
            return {}
        return self._speculation.guess(draft.running, draft.budget)

    def _add_guesses(self, draft: _Draft, now: float) -> list[BlockAppend]:
        """Put the guesses that are worth it behind the decodes of a step, as far as there are blocks for them.

        For a guess nothing is suspended, and each running request can still get a block. Returns the blocks that were given.
        """
        appends = []
        size = self._cache.chunk_size
        guesses = self._guess(draft)
        for number, request in enumerate(draft.running):
            guess, num_tokens = guesses.get(request, ()), request.num_tokens
            while num_tokens + len(guess) > len(request.chunks) * size:
                block_id = None
                if self._cache.num_available_blocks > len(self.running):
                    block_id = self._cache.try_append_block(request, now)
                if block_id is None:
                    guess = guess[: len(request.chunks) * size - num_tokens]
                    break
                appends.append(BlockAppend(request.request_id, block_id))
            if guess:
                tokens = (request.token_ids[-1], *guess)
                draft.segments[number] = QuerySegment(
                    request.request_id, num_tokens - 1, tokens, True, num_guesses=len(guess)
                )
        return appends

    def note_verified(self, request: Request) -> None:
        """The worker has verified guesses: it is told next how many of them have come true."""
        request.num_known_tokens = request.num_tokens

    def note_time(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long."""
        if self._speculation is not None:
            self._speculation.note_step(plan.segments, seconds)

    def _make_plan(
        self, draft: _Draft, starts: Sequence[RequestStart], appends: Sequence[BlockAppend], now: float
    ) -> StepPlan | None:
        """With the swap-outs that go beside it. None where there is nothing to do."""
        self._cache.plan_copies(self._watermark_blocks, now)
        if not draft.segments and not self._cache.transfers.planned:
            return None
        self._step_id += 1
        ended, self._ended = tuple(self._ended), []
        transfers = self._cache.transfers.take()
        return StepPlan(
            self._step_id,
            tuple(draft.segments),
            starts=tuple(starts),
            appends=tuple(appends),
            ended=ended,
            evictions=tuple(copy for _, copy in transfers.evictions),
            local_copies=tuple(transfers.local_copies),
            swap_ins=tuple(copy for _, _, copy in transfers.swap_ins),
            swap_outs=tuple(copy for _, copy in transfers.swap_outs),
        )

    # -- steps that are foreseen ---------------------------------------------------------------------------------------

    def count_blocks_until_copies(self) -> int | None:
        """How many blocks running requests can get before a step has to copy; None = the next one copies."""
        cache = self._cache
        if cache.drain is not None or (cache.handover is not None and cache.handover.has_copies_to_plan):
            return None
        return cache.allocator.count_blocks_until_copies(
            self._watermark_blocks, cache.config.swap_out_watermark, len(self.running)
        )

    def starts_none_before_one_ends(self) -> bool:
        """Whether no step starts a request, as long as none that runs ends, all decode, and none arrives.

        False if that is not certain.
        """
        num_running = len(self.running)
        if self.loading or self._speculation is not None or num_running > self._config.max_num_batched_tokens:
            return False
        request = self.waiting.peek()
        if request is None:
            return True
        if self._cache.tiers.slow or self.waiting.num_tenants > 1:
            return False
        if any(other.tenant != request.tenant for other in self.running):
            return False
        if num_running >= self._config.max_num_seqs:
            return True
        # It was refused for lack of blocks, and decodes take more of them, unless one of these computes what it needs, too.
        return (
            request is self._refused
            and not self._is_prompt_computed
            and not any(self._cache.may_complete(other, request) for other in self.running)
        )

    def skip_steps(self, num_steps: int) -> None:
        """So many steps, of which no result is told, did what was foreseen."""
        self._step_id += num_steps
        self._ended, self._ahead = [], None
        if len(self.running) >= self._config.max_num_seqs or not len(self.waiting):
            self._refused = None

    def _draft(self, executing: StepPlan | None = None) -> _Draft:
        """Segments for the running requests as they are, or as they will be after the plan `executing`.

        That is if nothing unforeseen happens: its segments are computed, a token is sampled where it samples, and a
        request that reaches its length ends.
        """
        budget = self._config.max_num_batched_tokens
        if self.running and self.running[0].is_prewarm:
            budget = min(budget, BACKGROUND_STEP_TOKENS)
        draft = _Draft(budget, MAX_SCORED_ROWS)
        num_computed: dict[str, int] = {}
        samplers: set[str] = set()
        for segment in () if executing is None else executing.segments:
            request_id = segment.request_id
            if segment.samples:
                samplers.add(request_id)
            else:
                num_computed[request_id] = num_computed.get(request_id, 0) + segment.query_len
        prefills: list[tuple[Request, list[tuple[int, int]]]] = []
        chunk_size = self._cache.chunk_size
        for request in self.running:
            num_tokens, pending = len(request.token_ids), request.pending
            if request.request_id in samplers:
                pending = [(num_tokens, num_tokens + 1)]
                num_tokens += 1
                if num_tokens >= request.max_total_tokens:
                    continue
            elif request.request_id in num_computed:
                pending = without_front(pending, num_computed[request.request_id])
            draft.running.append(request)
            if num_tokens > request.num_prompt_tokens and pending[0][0] == num_tokens - 1:
                if num_tokens > len(request.chunks) * chunk_size:
                    draft.growing.append(request)
                if draft.budget and num_tokens > request.num_known_tokens:  # as _add_segments has it, but sooner
                    draft.segments.append(QuerySegment(request.request_id, num_tokens - 1, None, True))
                    draft.budget -= 1
                else:
                    self._add_segments(draft, request, pending)
            else:
                prefills.append((request, pending))
        for request, pending in prefills:
            self._add_prompt(draft, request, pending)
        return draft

    def _add_prompt(self, draft: _Draft, request: Request, pending: Sequence[tuple[int, int]]) -> None:
        budget = draft.budget
        self._add_segments(draft, request, pending)
        draft.num_prompt_tokens += budget - draft.budget

    def _add_segments(self, draft: _Draft, request: Request, pending: Sequence[tuple[int, int]]) -> None:
        """As much of the pending ranges as the budget holds, front first. The last range ends with the context."""
        context_len, unscored = pending[-1][1], request.unscored
        for start, end in pending:
            stop = start + min(end - start, draft.budget)
            targets: tuple[int, ...] = ()
            if unscored and unscored.start < stop and start < unscored.stop:
                # Where it starts before them, a chunk is computed again that they share with others.
                if min(stop, unscored.stop) - start > draft.num_scorable:
                    stop = start + draft.num_scorable
                targets = tuple(request.token_ids[start + 1 : min(stop, unscored.stop) + 1])
                draft.num_scorable -= len(targets)
            if stop == start:
                break
            is_sampled = start >= request.num_known_tokens
            tokens = None if is_sampled else tuple(request.token_ids[start:stop])
            draft.segments.append(QuerySegment(request.request_id, start, tokens, stop == context_len, targets))
            draft.budget -= stop - start
            if stop < end:
                break

    def _append_blocks(self, growing: Sequence[Request], now: float) -> list[BlockAppend]:
        """One more block for each of them; as long as there is none, others are suspended, or the one that needs it."""
        appends = []
        for request in growing:
            while request.status is RequestStatus.RUNNING:
                block_id = self._cache.try_append_block(request, now)
                if block_id is not None:
                    appends.append(BlockAppend(request.request_id, block_id))
                    break
                self._suspend(self._shares.choose_to_suspend(self.running), now)
        return appends

    def _admit(self, draft: _Draft, now: float) -> tuple[_Draft, list[RequestStart]]:
        """Start waiting requests as far as budget and blocks reach; their segments come last in the draft.

        The first one may make others give way: then it is the only one, and the draft is another.
        """
        starts: list[RequestStart] = []
        self._refused = None
        may_go_on = True
        while may_go_on and draft.num_prompt_tokens < self._prefill_batch_tokens:
            request = self._whose_turn()
            has_place = len(self.running) < self._config.max_num_seqs
            # Nothing is started without budget; but where decodes take all of it, each gives a token back with its place.
            if request is not None and self._cache.has_slow_chunks and self._try_start_loading(request, now):
                continue
            if request is None or (not draft.budget and (has_place or draft.num_prompt_tokens)):
                break
            reserve = self._reserve_blocks if self.running else 0
            if not has_place or not self._cache.try_admit(request, reserve, now):
                self._refused = request if has_place and not self._cache.transfers.planned else None
                if starts or not self._try_admit_instead(request, now):
                    break
                draft, may_go_on = self._draft(), False
            if request.is_prewarm:
                self.background.remove(request)
                draft.budget = min(draft.budget, BACKGROUND_STEP_TOKENS)
            else:
                self.waiting.serve(request, request.num_pending_tokens)
            self._count_admission(request)
            request.status = RequestStatus.RUNNING
            request.phases.enter(Phase.PREFILL if request.first_token_s is None else Phase.DECODE, now)
            request.loads, request.load_deadline_s = {}, None
            self._expect_no_more(request)
            request.num_known_tokens = request.num_tokens
            self.running.append(request)
            starts.append(
                RequestStart(
                    request.request_id,
                    num_tokens=request.num_tokens,
                    num_prompt_tokens=request.num_prompt_tokens,
                    sampling=request.sampling,
                    stop_token_ids=tuple(sorted(request.stop_token_ids)),
                    block_table=self._cache.block_table(request),
                    token_ids=tuple(request.token_ids) if request.sampling.needs_token_ids else (),
                    adapter=request.adapter,
                )
            )
            self._add_prompt(draft, request, request.pending)
        return draft, starts

    def _try_admit_instead(self, request: Request, now: float) -> bool:
        """Admit `request` in the place of those that have to give way to it; False, and nothing changed, if none have."""
        giving_way = self._choose_to_give_way(request)
        if not giving_way or len(self.running) - len(giving_way) >= self._config.max_num_batched_tokens:
            return False
        for other in giving_way:
            self._suspend(other, now)
        self._stats.num_gave_way += len(giving_way)
        is_admitted = self._cache.try_admit(request, self._reserve_blocks, now)
        assert is_admitted, "those that gave way have made room"
        return True

    def _choose_to_give_way(self, request: Request) -> list[Request]:
        """The running requests of other tenants that have to be suspended for `request` to be admitted.

        None if it has to wait, because they have no more than their shares, or because all of them together would not
        be enough.
        """
        if all(other.tenant == request.tenant for other in self.running):
            return []
        num_blocks = self._cache.count_taken_blocks(request)
        num_lacking = num_blocks + self._reserve_blocks - self._cache.num_available_blocks
        num_places = self._config.max_num_seqs - len(self.running)
        giving_way = self._shares.choose_to_give_way(request, num_blocks, self.running)
        for number, num_given in enumerate(self._cache.count_given_blocks(giving_way), start=1):
            if num_given >= num_lacking and num_places + number > 0:
                return giving_way[:number]
        return []

    def _count_admission(self, request: Request) -> None:
        stats = self._stats
        if request.status is RequestStatus.SUSPENDED:
            stats.num_resumed_tokens += request.num_pending_tokens
            return
        # A request that was begun elsewhere has to compute output tokens too; they are not part of its prompt.
        num_prompt = request.num_prompt_tokens
        num_pending = sum(max(0, min(end, num_prompt) - start) for start, end in request.pending)
        request.num_cached_tokens = num_prompt - num_pending
        account = request.account
        request.num_loaded_tokens = sum(account.loaded_tokens.values())
        request.num_not_loaded_tokens = account.num_not_loaded_tokens
        request.num_dropped_tokens = account.num_dropped_tokens
        stats.num_resumed_tokens += request.num_pending_tokens - num_pending
        stats.num_prompt_tokens += request.num_prompt_tokens
        request.cached_by_tier = stats.note_cached(request.num_cached_tokens, account.loaded_tokens)
        stats.num_not_loaded_tokens += request.num_not_loaded_tokens
        stats.num_dropped_tokens += request.num_dropped_tokens
        stats.num_new_tokens += request.num_new_tokens

    def restart(self, request: Request, now: float) -> None:
        """What the last step did for a running request is void: put it back to the front of the queue."""
        self._put_back(request, now, step_failed=True)

    def _suspend(self, request: Request, now: float) -> None:
        self._put_back(request, now, step_failed=False)
        request.num_suspensions += 1
        self._stats.num_suspensions += 1

    def _put_back(self, request: Request, now: float, *, step_failed: bool) -> None:
        self.running.remove(request)
        self._end(request, now, step_failed, is_preempted=True)
        request.status = RequestStatus.SUSPENDED
        request.phases.enter(Phase.SUSPENDED, now)
        if request.is_prewarm:
            self.background.appendleft(request)
        else:
            self.waiting.put_back(request)

    def _end(self, request: Request, now: float, step_failed: bool = False, is_preempted: bool = False) -> None:
        self._cache.release(request, now, step_failed=step_failed, is_preempted=is_preempted)
        self._ended.append(request.request_id)
        self._refused = None


def _has_guesses(plan: StepPlan) -> bool:
    return any(segment.num_guesses for segment in plan.segments)
