"""The engine without a device: requests in, plans out, results in, outputs out.

One instance serves live traffic or a simulation; the driver owns the clock.

    plan = core.schedule(now)                 # what to compute
    result = executor.execute(plan)           # or an event at now + cost_model.step_time(plan)
    outputs = core.update(plan, result, now)  # what came of it

While a plan is executed, `core.schedule_ahead(now)` gives the next one, to be executed behind it, if that does not depend on
its result. Otherwise, or if the executor takes one plan at a time, `core.draft_ahead(plan)` drafts the next one. Plans
are the same with drafts and without; outputs are the same with plans made ahead and without.

A driver without an executor need not plan steps that only decode: `core.advance` applies several at once, as many as
`core.foresee_decodes` foresees.

With slow tiers, the driver also starts what `core.take_transfers()` gives after each plan, and tells the end of each transfer
by `core.complete_transfer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice, repeat
from typing import Any, NamedTuple

from engine.core.cache.cache_manager import CacheManager
from engine.core.cache.chunk_events import ChunkEvents
from engine.core.cache.retention import OUTCOMES
from engine.core.cache_map import ContextKeys, Eviction, MappedContext
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.decode_runs import DecodeRun, DecodeRuns
from engine.core.phases import Phase
from engine.core.plan import ChunkRecord, Logprobs, QuerySegment, SlowTransfer, StepPlan, StepResult, TransferEnd
from engine.core.request import FinishReason, Request, RequestStatus, without_front
from engine.core.retention import RetentionHint, RetentionOutcome
from engine.core.scheduler import Scheduler
from engine.core.stats import EngineStats, RequestStats
from engine.core.tier_table import PEER
from engine.errors import ConfigError, ContextLengthError, InvalidParameterError, OverloadedError

# Requests that only prepare a context; more may not wait.
MAX_BACKGROUND_REQUESTS = 64


class RequestOutput(NamedTuple):
    """What one step gave to one request: its next token. The counts are as of then.

    finish_reason: None = more follows.
    stats: come with the end.
    prompt_logprobs: come with the first token, if they were asked for.

    (A tuple, as one is made for each request and step while nothing else runs.)
    """

    request_id: str
    token_id: int
    logprobs: Logprobs | None
    num_output_tokens: int
    num_cached_tokens: int
    finish_reason: FinishReason | None = None
    stats: RequestStats | None = None
    prompt_logprobs: tuple[Logprobs, ...] = ()


class EngineCore:
    """Scheduler and cache manager under one roof. Not thread-safe; makes no call that waits.

    handover: of chunks between this engine and others; None unless there is a tier for it.
    """

    def __init__(self, cache: CacheConfig, scheduling: SchedulingConfig) -> None:
        """Raises ConfigError if the GPU tier cannot hold one context of max_model_len: such a request could never run."""
        if scheduling.max_model_len > cache.num_gpu_blocks * cache.chunk_size:
            raise ConfigError(
                f"max_model_len is {scheduling.max_model_len}, but the GPU tier holds only {cache.num_gpu_blocks} blocks of "
                f"{cache.chunk_size} tokens; lower max_model_len or give the GPU tier more memory",
                param="max_model_len",
            )
        self.cache_config = cache
        self.scheduling_config = scheduling
        self.stats = EngineStats([tier.name for tier in cache.tiers])
        self._cache = CacheManager(cache, self.stats)
        self.handover = self._cache.handover
        self._scheduler = Scheduler(scheduling, self._cache, self.stats)
        self._runs = DecodeRuns(self._scheduler, self._cache, self.stats)
        self._requests: dict[str, Request] = {}
        # Plans without a result yet, oldest first; and the requests that are to end when the oldest one's is there, because
        # what it computes of them is worth keeping.
        self._in_flight: list[StepPlan] = []
        self._to_abort: list[str] = []
        self._begun_s: float | None = None  # when the oldest of them could begin

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def add_request(self, request: Request, now: float) -> list[str]:
        """Queue a request.

        Returns the ids of waiting requests that were shed for it, because their tenants had more than their share of
        the queue. Raises ContextLengthError or InvalidParameterError, and nothing changed, for a request that can
        never run here; OverloadedError if the queue is full.
        """
        num_prompt, window = request.num_prompt_tokens, self.scheduling_config.max_model_len
        if request.request_id in self._requests:
            raise InvalidParameterError(
                f"a request with id {request.request_id!r} is running already; use another id", param="request_id"
            )
        if not num_prompt:
            raise InvalidParameterError("the prompt is empty; give at least one token", param="prompt")
        max_tokens = 0 if request.is_prewarm else request.sampling.max_tokens
        if num_prompt + (1 if max_tokens is None else max_tokens) > window:
            answer = "one token of answer" if max_tokens is None else f"max_tokens={max_tokens}"
            raise ContextLengthError(
                f"the context window is {window} tokens, but the prompt has {num_prompt} and needs room for {answer}; "
                "shorten the prompt" + ("" if max_tokens is None else " or lower max_tokens"),
            )
        if request.is_prewarm and len(self._scheduler.background) >= MAX_BACKGROUND_REQUESTS:
            raise OverloadedError(f"{MAX_BACKGROUND_REQUESTS} contexts wait to be prepared already; try again later")
        shed = [] if request.is_prewarm else self._make_room_to_wait(request, now)
        request.max_total_tokens = window if max_tokens is None else num_prompt + (max_tokens or 1)
        request.arrival_s = now
        request.phases.enter(Phase.QUEUE, now)
        self._requests[request.request_id] = request
        self._cache.shares.note(request.tenant, request.weight)
        self._scheduler.add(request)
        self.stats.num_requests += 1
        return shed

    def _make_room_to_wait(self, newcomer: Request, now: float) -> list[str]:
        """Shed waiting requests, by fairness between tenants, until `newcomer` may wait too; returns their ids.

        Raises OverloadedError, and sheds none, if the newcomer is the one that has to go.
        """
        scheduler = self._scheduler
        waiting = scheduler.waiting
        max_tokens = self.scheduling_config.max_num_queued_tokens
        shed: list[Request] = []
        while scheduler.num_waiting and (
            scheduler.num_waiting >= self.scheduling_config.max_num_queued_reqs
            or (max_tokens is not None and scheduler.num_waiting_tokens + newcomer.num_tokens > max_tokens)
        ):
            victim = waiting.find_victim(newcomer)
            if victim is None:
                for request in reversed(shed):
                    self._scheduler.add(request)
                self.stats.num_refused += 1
                raise OverloadedError(
                    f"the queue is full ({scheduler.num_waiting} requests, {scheduler.num_waiting_tokens} tokens); "
                    "try again later"
                )
            waiting.remove(victim)
            shed.append(victim)
        for request in shed:
            if self.handover is not None:
                self.handover.forget(request.request_id)
            request.status = RequestStatus.FINISHED
            del self._requests[request.request_id]
        self.stats.num_refused += len(shed)
        return [request.request_id for request in shed]

    def schedule(self, now: float) -> StepPlan | None:
        """What to compute next; None if there is nothing to do.

        A plan without segments moves blocks while no request runs. Each plan must be answered by `update` or
        `fail_step` before the next call.
        """
        assert not self._in_flight, "a plan has no result yet"
        self._begun_s = now
        return self._note_in_flight(self._scheduler.schedule(now))

    def schedule_ahead(self, now: float) -> StepPlan | None:
        """The step after the one in flight, to be executed behind it; results have to come in the order of the plans.

        None if the result of the one in flight could admit a waiting request or force a preemption, or if there is
        nothing to do. If that result unexpectedly ends a request, the second step's work for it is wasted and its
        output is dropped.
        """
        (executing,) = self._in_flight
        return self._note_in_flight(self._scheduler.schedule_ahead(executing, now))

    def draft_ahead(self, plan: StepPlan) -> None:
        """Draft the step after `plan`, the one that is executed, so that the next `schedule` has less to do.

        Changes no request and no block; a draft that something unforeseen overtakes is discarded.
        """
        self._scheduler.draft_ahead(plan)

    def update(self, plan: StepPlan, result: StepResult, now: float) -> list[RequestOutput]:
        """Take in what a step gave, the oldest one in flight. Requests that ended meanwhile are passed over."""
        assert plan.step_id == result.step_id, (plan.step_id, result.step_id)
        self.stats.num_steps += 1
        swap_in_s, swap_out_s = result.swap_seconds
        self.stats.swap_in_seconds += swap_in_s
        self.stats.swap_out_seconds += swap_out_s
        self._restart_corrupted(plan, result, now)
        self._cache.transfers.complete()
        sampled = zip(result.token_ids, result.logprobs or repeat(None), strict=False)
        scores = iter(result.prompt_logprobs)
        num_step_tokens = 0
        outputs = []
        running = RequestStatus.RUNNING
        for segment in plan.segments:
            token_id, logprobs = next(sampled) if segment.samples else (None, None)
            further = tuple(islice(sampled, segment.num_guesses)) if segment.num_guesses else ()
            scored = tuple(islice(scores, len(segment.targets))) if segment.targets else ()
            request = self._requests.get(segment.request_id)
            if request is None or request.status is not running:
                continue
            num_tokens = segment.query_len - segment.num_guesses
            self._cache.commit(request, segment.start, segment.start + num_tokens)
            request.num_computed_tokens += num_tokens
            num_step_tokens += num_tokens
            if scored:
                self._note_scores(request, segment.start, scored)
            if token_id is None:
                request.pending = without_front(request.pending, num_tokens)
            elif segment.request_id not in self._to_abort:
                outputs.append(self._append(request, token_id, logprobs, now))
                if further:
                    outputs += self._append_verified(request, segment, token_id, further, now)
        self.stats.num_computed_tokens += num_step_tokens
        if self._begun_s is not None:
            if self._cache.tiers.slow:
                self._cache.prices.note_step(plan.segments, now - self._begun_s)
            self._scheduler.note_time(plan, now - self._begun_s)
            self._begun_s = now  # the next one is behind it, or `schedule` makes it
        self._land(now)
        return outputs

    def foresee_decodes(self) -> DecodeRun:
        """The next steps that only decode and move nothing, as far as they are foreseen; see `advance`.

        It holds until a request is added, aborted or stopped, or a transfer ends; the step that is under way then is still
        as foreseen. Without such steps, schedule the next one.
        """
        assert not self._in_flight, "a plan has no result yet"
        return self._runs.foresee()

    def advance(
        self, times: Sequence[float], next_tokens: Callable[[Request, int], Sequence[int]]
    ) -> list[RequestOutput]:
        """Apply several steps at once: what so many calls of `schedule` and `update` would do, without their plans.

        times: when the first step begins, then when each one ends and the next one begins; for at most
            `foresee_decodes().num_steps` steps.
        next_tokens: the tokens that the steps give to a request, so many of them.

        Returns the outputs of those requests that end, which they do with the last step.
        """
        outputs = []
        for request in self._runs.advance(times, next_tokens):
            outputs.append(self._end_at_length(request, times[-1]))
        return outputs

    def _end_at_length(self, request: Request, now: float) -> RequestOutput:
        self._finish(request, now)
        self.stats.num_finished += 1
        return RequestOutput(
            request.request_id,
            request.token_ids[-1],
            None,
            request.num_output_tokens,
            request.num_cached_tokens,
            FinishReason.LENGTH,
            self._account(request, now),
        )

    def fail_step(self, plan: StepPlan, now: float, *, are_copies_made: bool = False) -> list[str]:
        """The executor failed at `plan`: end its requests, keep everything else.

        are_copies_made: False = chunks whose only copy was on its way are dropped.
        Returns the ids of the requests that ended.
        """
        self._scheduler.forget_step(plan)
        if are_copies_made:
            self._cache.transfers.complete()
        else:
            self._cache.transfers.abort(now)
        request_ids = dict.fromkeys(segment.request_id for segment in plan.segments)
        failed = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        for request in failed:
            self._finish(request, now, step_failed=True)
        self.stats.num_failed += len(failed)
        self._land(now)
        return [request.request_id for request in failed]

    # -- slow tiers ----------------------------------------------------------------------------------------------------

    def take_transfers(self) -> tuple[SlowTransfer, ...]:
        """The transfers of slow tiers to start now, beside the steps; to be asked for after each `schedule`.

        The end of each has to be told once, by `complete_transfer`; in whichever order, and between any two calls.
        """
        return self._cache.slow_transfers.take()

    def complete_transfer(self, end: TransferEnd, now: float) -> None:
        """A transfer of a slow tier has ended."""
        self._cache.complete_transfer(end, now)
        self._scheduler.end_transfer(end.transfer_id, now)

    def await_records(self, tier_name: str) -> None:
        """Before the first request: a slow tier may have chunks of an earlier process, which `restore` will tell."""
        self._cache.await_records(tier_name)

    def note_load_price(self, tier_name: str, seconds: float, now: float) -> None:
        """A chunk was loaded from a slow tier in so long, before any transfer."""
        self._cache.prices.note_load(tier_name, seconds, now)

    def restore(self, tier_name: str, records: Mapping[int, ChunkRecord | None], now: float) -> None:
        """What lies in these blocks of a slow tier; None = nothing that can be used. Each block once."""
        self._cache.restore(tier_name, records, now)

    def start_drain(self, now: float) -> None:
        """Bring what the fast tiers hold to a slow one that keeps it, if there is one. No request may follow."""
        self._cache.start_drain(now)

    def is_drained(self, now: float) -> bool:
        """Whether all of it that is worth it has arrived, or no more can."""
        drain = self._cache.drain
        return drain is None or drain.is_done(now)

    def hanging_tiers(self, now: float) -> list[str]:
        """The slow tiers that are left alone because a transfer of theirs does not end."""
        cache = self._cache
        return [tier.name for tier in cache.tiers.slow if cache.slow_transfers.hangs(tier, now)]

    def next_deadline_s(self) -> float | None:
        """The time at which a request, or a peer, stops waiting for a slow tier, so that steps go on; None = none waits."""
        deadlines = [request.load_deadline_s for request in self._scheduler.loading]
        if self.handover is not None:
            deadlines.append(self.handover.sends.deadline_s)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def abort(self, request_id: str, now: float) -> None:
        """End a request early; what it computed stays in the cache.

        If a plan of it is being executed, it ends with that. An unknown id is no error: the request may just have ended.
        """
        executing = self._in_flight[0].segments if self._in_flight else ()
        if any(segment.request_id == request_id for segment in executing):
            self._to_abort.append(request_id)
        else:
            self._abort(request_id, now)

    def abort_adapter(self, adapter: str, now: float) -> None:
        """End all requests that use an adapter, such as those that prepare a context."""
        for request_id in [each.request_id for each in self._requests.values() if each.adapter == adapter]:
            self.abort(request_id, now)

    def stop(
        self,
        request_id: str,
        now: float,
        *,
        num_output_tokens: int | None = None,
        num_kept_output_tokens: int | None = None,
    ) -> RequestStats | None:
        """End a request whose answer is complete for a reason that the core does not see (a stop string).

        num_output_tokens: with how many tokens it is; a step may have given more. None = with all.
        num_kept_output_tokens: of its output, the first so many are what the conversation goes on from; None = all.
        Returns None if it does not run. It has sampled, so no transfer of its own is in flight.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        if num_output_tokens is not None:
            del request.token_ids[request.num_prompt_tokens + num_output_tokens :]
        account = self._account(request, now)
        if num_kept_output_tokens is not None:
            del request.token_ids[request.num_prompt_tokens + num_kept_output_tokens :]
        self._finish(request, now)
        self.stats.num_finished += 1
        return account

    @property
    def num_running(self) -> int:
        """Requests that are computed."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn, or for what is being loaded for them."""
        return self._scheduler.num_waiting

    def get_statistics(self) -> dict[str, Any]:
        """Counters since the start, and the state now (requests by status, blocks by use).

        tiers: names, the fastest first; in other keys, `num_<tier>_...` is of that tier.
        """
        cache = self._cache
        statistics = {
            "tiers": [tier.name for tier in cache.tiers],
            **self.stats.as_dict(),
            "num_requests_running": len(self._scheduler.running),
            "num_requests_waiting": self._scheduler.num_waiting,
            "num_tokens_waiting": self._scheduler.num_waiting_tokens,
            "num_chunks": len(cache.index),
            "num_idle_chunks": cache.count_idle_chunks(),
            "retention": self._count_retention(),
        }
        for tier in cache.tiers:
            statistics[f"num_{tier.name}_blocks"] = tier.pool.num_blocks
            statistics[f"num_{tier.name}_blocks_free"] = tier.pool.num_free
        primary = cache.tiers.primary
        statistics[f"num_{primary.name}_blocks_pinned"] = primary.pool.num_blocks - primary.num_available
        return statistics

    def _count_retention(self) -> dict[str, int]:
        """Hints by outcome, and the tokens that they keep, the last chunk of a context counted as a full one."""
        retention = self._cache.retention
        if retention is None:
            return {**dict.fromkeys(OUTCOMES, 0), "refused": self.stats.num_refused_hints, "num_kept_tokens": 0}
        return {**retention.counts, "num_kept_tokens": retention.count_kept() * self._cache.chunk_size}

    @property
    def token_compute_s(self) -> tuple[float, float] | None:
        """See LoadPrices."""
        return self._cache.prices.token_compute_s

    @property
    def token_pull_s(self) -> float | None:
        """Seconds until a token's KV has come from a peer; None until that was observed."""
        return self._cache.prices.token_load_s(PEER)

    # -- hints ---------------------------------------------------------------------------------------------------------

    def retain(
        self, conversation_id: str, keys: ContextKeys, tenant: str, hint: RetentionHint, now: float
    ) -> RetentionOutcome:
        """Keep, or let go, what is cached of a conversation.

        If requests of it wait or run, it is said of them at their end: nothing that they bring undoes it.

        keys: of its context, as far as that is known.
        """
        for request in self._requests.values():
            if request.conversation_id == conversation_id:
                request.retention = hint
        return self._cache.retain(conversation_id, keys, tenant, hint, now)

    def expect_use(self, request: Request, expected_use_s: float, now: float) -> None:
        """The context of a request that has ended is expected to be used then."""
        if self._cache.retention is not None and request.status is RequestStatus.FINISHED:
            self._cache.retention.expect(self._cache.idle_chunks_of(request), expected_use_s, now)

    def has_holes_to_fill(self, request: Request) -> bool:
        """Whether parts of a context are to be computed, behind others or not, and there are blocks for it that cost nothing.

        request: that would do it.
        """
        return self._cache.has_holes_to_fill(request)

    def watch_chunks(self) -> ChunkEvents:
        """Which full chunks come and go, noted from the first call on; to be taken between two steps."""
        return self._cache.watch_chunks()

    # -- for those who watch -------------------------------------------------------------------------------------------

    def live_conversations(self, max_num: int) -> list[tuple[str, str]]:
        """(conversation id, tenant) of the requests that run or wait, the oldest first; at most so many."""
        return [(request.conversation_id, request.tenant) for request in islice(self._requests.values(), max_num)]

    def map_contexts(
        self, contexts: Mapping[str, ContextKeys | None], max_chunks: int, now: float
    ) -> dict[str, MappedContext]:
        """Where the chunks of these conversations lie, by id. O(chunks); nothing changed.

        They are as their running requests have them, else as `contexts` names them. The evictions of the next seconds
        are noted.

        max_chunks: most of each context.
        """
        self._cache.eviction_log.watch(now)
        requests = {request.conversation_id: request for request in self._requests.values()}
        mapped = {}
        for conversation_id, keys in contexts.items():
            request = requests.get(conversation_id)
            status = "idle" if request is None else request.status.value
            if request is not None and request.chunks:
                cells = self._cache.map.map_row(request, max_chunks, now)
                mapped[conversation_id] = MappedContext(
                    status,
                    self._cache.num_chunks(request.num_tokens),
                    tuple(cells),
                    tuple(request.chunk_keys[:max_chunks]),
                )
            elif keys is not None:
                names = (*keys.full, *(key for _, key in keys.tails))
                cells = self._cache.map.map_context(keys, now)
                mapped[conversation_id] = MappedContext(status, keys.num_chunks, tuple(cells), names)
            elif request is not None:
                mapped[conversation_id] = MappedContext(status, self._cache.num_chunks(request.num_tokens), (), ())
        return mapped

    def latest_evictions(self) -> tuple[Eviction, ...]:
        """Those that were noted, the newest first."""
        return self._cache.eviction_log.latest()

    def hold_back(self, num_blocks: Mapping[str, int], now: float) -> None:
        """See Allocator.hold_back."""
        self._cache.allocator.hold_back(num_blocks, now)

    def count_held_blocks(self) -> dict[str, int]:
        """See CacheManager.count_held_blocks."""
        return self._cache.count_held_blocks()

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance; see CacheManager.check_integrity."""
        scheduler = self._scheduler
        live = [*scheduler.running, *scheduler.waiting, *scheduler.loading, *scheduler.background]
        assert {id(r) for r in self._requests.values()} == {id(r) for r in live}
        assert all(r.status is RequestStatus.LOADING for r in scheduler.loading)
        assert all(r.status is RequestStatus.RUNNING and r.chunks for r in scheduler.running)
        assert not any(r.chunks for r in (*scheduler.waiting, *scheduler.loading, *scheduler.background))
        assert all(sum(r.cached_by_tier.values()) == r.num_cached_tokens for r in live)
        self._cache.check_integrity(scheduler.running)

    def _note_in_flight(self, plan: StepPlan | None) -> StepPlan | None:
        if plan is not None:
            self._in_flight.append(plan)
        return plan

    def _land(self, now: float) -> None:
        """The oldest plan in flight is done: end what was to end with it.

        The next one may still write to their blocks; that does no harm, as all uses of these blocks come after it.
        """
        del self._in_flight[0]
        to_abort, self._to_abort = self._to_abort, []
        for request_id in to_abort:
            self._abort(request_id, now)

    def _abort(self, request_id: str, now: float) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, now)
            self.stats.num_aborted += 1

    def _restart_corrupted(self, plan: StepPlan, result: StepResult, now: float) -> None:
        """Requests that a failed swap-in has reached start again from what else is cached."""
        failed = {self._cache.transfers.fail_swap_in(gpu_block, now) for gpu_block in result.failed_swap_ins}
        if failed:
            for request in list(reversed(self._scheduler.running)):  # the oldest comes to lie in front
                if not failed.isdisjoint(request.chunks):
                    self._scheduler.restart(request, now)

    @staticmethod
    def _note_scores(request: Request, start: int, scores: Sequence[Logprobs]) -> None:
        """Those of positions from `start` on, some of which may be known."""
        new = scores[request.num_scored - start :]
        request.prompt_logprobs += new
        request.num_scored += len(new)

    def _append(self, request: Request, token_id: int, logprobs: Logprobs | None, now: float) -> RequestOutput:
        if request.is_prewarm:
            return self._end_prewarm(request, token_id, now)
        request.token_ids.append(token_id)
        num_tokens = len(request.token_ids)
        num_output_tokens = num_tokens - request.num_prompt_tokens
        request.pending = [(num_tokens - 1, num_tokens)]
        self.stats.num_output_tokens += 1
        self._scheduler.waiting.charge(request, 1)
        if request.first_token_s is None:
            request.first_token_s = now
            request.phases.enter(Phase.DECODE, now)
        reason = account = None
        if token_id in request.stop_token_ids and num_output_tokens > request.sampling.min_tokens:
            reason = FinishReason.STOP
        elif num_tokens >= request.max_total_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._finish(request, now)
            self.stats.num_finished += 1
            account = self._account(request, now)
        prompt_logprobs: tuple[Logprobs, ...] = ()
        if request.prompt_logprobs:
            prompt_logprobs, request.prompt_logprobs = tuple(request.prompt_logprobs), []
        return RequestOutput(
            request.request_id,
            token_id,
            logprobs,
            num_output_tokens,
            request.num_cached_tokens,
            reason,
            account,
            prompt_logprobs,
        )

    def _append_verified(
        self,
        request: Request,
        segment: QuerySegment,
        token_id: int,
        further: Sequence[tuple[int, Logprobs | None]],
        now: float,
    ) -> list[RequestOutput]:
        """What came of guesses, as if each of these tokens had had a step of its own.

        token_id: the first one, which is appended. further: what the rows of the guesses have chosen.
        """
        outputs: list[RequestOutput] = []
        status = RequestStatus.RUNNING
        num_true = 0
        for guess, (next_id, logprobs) in zip(segment.guesses, further, strict=True):
            if guess != token_id:
                break
            num_true += 1
            # With stop strings, its text may have ended before this one: that has to be known before it ends.
            if request.status is not status or (request.sampling.stop and self._ends(request, next_id)):
                break
            position = segment.start + num_true
            self._cache.commit(request, position, position + 1)
            request.num_computed_tokens += 1
            self.stats.num_computed_tokens += 1
            token_id = next_id
            outputs.append(self._append(request, token_id, logprobs, now))
        request.num_guessed_tokens += segment.num_guesses
        request.num_accepted_tokens += num_true
        self.stats.num_guessed_tokens += segment.num_guesses
        self.stats.num_accepted_tokens += num_true
        self._scheduler.note_verified(request)
        return outputs

    def _ends(self, request: Request, token_id: int) -> bool:
        """Whether an answer ends with this token, the next one."""
        return request.num_tokens + 1 >= request.max_total_tokens or token_id in request.stop_token_ids

    def _end_prewarm(self, request: Request, token_id: int, now: float) -> RequestOutput:
        """The whole context is computed; the token behind it is not wanted."""
        self._finish(request, now)
        self.stats.num_finished += 1
        account = self._account(request, now)
        return RequestOutput(
            request.request_id, token_id, None, 0, request.num_cached_tokens, FinishReason.STOP, account
        )

    def _finish(self, request: Request, now: float, *, step_failed: bool = False) -> None:
        self._scheduler.remove(request, now, step_failed=step_failed)
        request.status = RequestStatus.FINISHED
        del self._requests[request.request_id]

    def _count_written(self, request: Request) -> int:
        """Tokens whose KV is kept and was not before: all but the last one, which nothing has computed yet."""
        num_known = request.num_cached_tokens + request.num_not_loaded_tokens
        return (
            max(0, request.num_tokens - (0 if request.is_prewarm else 1) - num_known) if self.cache_config.keep else 0
        )

    def _account(self, request: Request, now: float) -> RequestStats:
        return RequestStats(
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            num_loaded_tokens=request.num_loaded_tokens,
            num_not_loaded_tokens=request.num_not_loaded_tokens,
            num_dropped_tokens=request.num_dropped_tokens,
            num_new_tokens=request.num_new_tokens,
            num_output_tokens=request.num_output_tokens,
            num_computed_tokens=request.num_computed_tokens,
            num_suspensions=request.num_suspensions,
            num_written_tokens=self._count_written(request),
            cached_by_tier=request.cached_by_tier,
            arrival_s=request.arrival_s,
            first_token_s=request.first_token_s,
            finished_s=now,
            phases=request.phases.end(now),
        )
