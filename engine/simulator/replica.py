"""One engine core, and the time that its steps take. Executes nothing: every sampled token is the one that was agreed on."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence

from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.plan import SlowTransfer, StepPlan, StepResult, TransferEnd
from engine.core.request import Request
from engine.core.tier_table import PEER
from engine.simulator.events import END_OF_STEP, END_OF_TRANSFER, Events
from engine.simulator.handover import Peer
from engine.simulator.links import Link
from engine.simulator.outcome import ReplicaRow
from engine.simulator.routing import ReplicaState
from engine.simulator.step_cost import StepCost, StepWork


class Replica:
    """Drives one core by the events of its steps.

    What is under way is one of: nothing; a step, whose plan waits for its result; or a run of steps that only decode, which
    is applied when it ends. What happens in the middle of a run (a request arrives, a transfer ends) ends it with the step
    that is computed then.
    """

    def __init__(
        self,
        rank: int,
        core: EngineCore,
        cost: StepCost,
        events: Events,
        on_end: Callable[[Replica, Request, RequestOutput, float], None],
        links: Mapping[str, tuple[Link, Link]] | None = None,
        bytes_per_block: float = 0.0,
        on_plan: Callable[[StepPlan, float], None] | None = None,
        replica_id: int = 0,
    ) -> None:
        """Nothing is under way.

        replica_id: another one for each replica that starts. peer: its end of the network, if it hands over.
        on_end: is told each request that has ended. links: from and to each slow tier.
        on_plan: is told each plan, and when; then every step is scheduled. None = steps that only decode are applied at once.
        recompute_s: what was spent on computing again what had been computed before. busy_s: time of steps.
        """
        self.rank = rank
        self.replica_id = replica_id
        self.core = core
        self.peer: Peer | None = None
        self.requests: dict[str, Request] = {}
        self.recompute_s = 0.0
        self.num_recomputed_tokens = 0
        self.busy_s = 0.0
        self._cost = cost
        self._chunk_cost = cost.cost_model(core.cache_config.chunk_size)
        self._events = events
        self._on_end = on_end
        self._links = links or {}
        self._bytes_per_block = bytes_per_block
        self._on_plan = on_plan
        self._tokens: dict[str, int] = {}
        self._num_known: dict[str, int] = {}
        self._recomputed: dict[str, tuple[int, float]] = {}
        self._plan: StepPlan | None = None
        self._times: list[float] = []
        self._wake_number = 0  # of the wake-up that counts; those before it were for what has been cut since
        self._is_idle = True
        self._is_stopped = False

    @property
    def num_open_requests(self) -> int:
        return len(self.requests)

    def state(self) -> ReplicaState:
        """What ingresses are told."""
        core = self.core
        stats = core.stats
        return ReplicaState(
            self.replica_id,
            core.num_running,
            core.num_waiting,
            stats.num_finished + stats.num_aborted + stats.num_failed,
            core.scheduling_config.max_num_seqs,
            core.token_compute_s,
            core.token_pull_s,
        )

    def row(self, started_s: float, ended_s: float) -> ReplicaRow:
        """What it has done."""
        return ReplicaRow(
            self.rank,
            started_s,
            ended_s,
            self.busy_s,
            self.recompute_s,
            self.num_recomputed_tokens,
            self.core.stats.slow_transfers.get("peer_loaded", 0) * self._bytes_per_block,
            self.core.get_statistics(),
        )

    def add(self, request: Request, token: int, num_known: int, now: float) -> list[Request]:
        """A request has arrived. Returns the waiting ones of other tenants that were shed for it.

        token: what each of its steps samples. num_known: of its prompt, the first tokens that were computed at some time.
        Raises what EngineCore.add_request raises, and then nothing has changed.
        """
        self._cut(now)
        shed = [self._forget(request_id) for request_id in self.core.add_request(request, now)]
        self.requests[request.request_id] = request
        self._tokens[request.request_id] = token
        self._num_known[request.request_id] = num_known
        if self._is_idle:
            self._wake_at(now)  # behind all else that arrives now
        return shed

    def run(self, command: Callable[[], None], now: float) -> None:
        """Let the core do something beside its steps, and then whatever follows from it."""
        self._cut(now)
        command()
        if self._is_idle:
            self._wake_at(now)

    def fail(self, now: float) -> list[Request]:
        """The replica is lost, with the step under way. Returns its requests, with the tokens that were given."""
        if self._times:
            num_done = bisect_right(self._times, now) - 1
            if num_done:
                self.core.advance(self._times[: num_done + 1], self._next_tokens)
        self.stop()
        lost, self.requests = list(self.requests.values()), {}
        return lost

    def stop(self) -> None:
        """Nothing is computed any more, whatever comes."""
        self._wake_number += 1
        self._is_stopped = True
        self._plan, self._times = None, []

    def take_recomputed(self, request_id: str) -> tuple[int, float]:
        """What an ended request had to compute again: tokens, and seconds."""
        return self._recomputed.pop(request_id, (0, 0.0))

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _wake_at(self, time_s: float, since: float | None = None) -> None:
        """since: when what ends then began; None = nothing is computed."""
        if self._is_stopped:
            return
        self._wake_number += 1
        self._is_idle = False
        self._events.add(time_s, END_OF_STEP, self._wake, self._wake_number)
        if since is not None:
            self.busy_s += time_s - since

    def _wake(self, now: float, number: int) -> None:
        if number != self._wake_number:
            return
        outputs: Iterable[RequestOutput] = ()
        if self._plan is not None:
            plan, self._plan = self._plan, None
            tokens = tuple(self._tokens[segment.request_id] for segment in plan.segments if segment.samples)
            outputs = self.core.update(plan, StepResult(plan.step_id, tokens), now)
        elif self._times:
            times, self._times = self._times, []
            outputs = self.core.advance(times, self._next_tokens)
        ended = [output for output in outputs if output.finish_reason is not None]
        for output in ended:
            self._on_end(self, self._forget(output.request_id), output, now)
        if ended:
            self._wake_at(now)  # behind those that ask on at once
        else:
            self._begin(now)

    def _forget(self, request_id: str) -> Request:
        del self._tokens[request_id], self._num_known[request_id]
        return self.requests.pop(request_id)

    def _begin(self, now: float) -> None:
        core = self.core
        run = core.foresee_decodes() if self._on_plan is None else None
        if run is not None and run.num_steps > 1:
            self._times = self._run_times(run.num_steps, run.num_requests, run.context_len, now)
            self._wake_at(self._times[-1], now)
            return
        plan = core.schedule(now)
        for transfer in core.take_transfers():
            self._start_transfer(transfer, now)
        if self.peer is not None:
            self.peer.tell(now)
        if plan is None:
            self._is_idle = True
            deadline_s = core.next_deadline_s()
            if deadline_s is not None:
                self._wake_at(max(now, deadline_s))
                self._is_idle = True  # whatever comes earlier wakes it, too
            return
        if plan.starts:
            self._note_recomputed(plan)
        if self._on_plan is not None:
            self._on_plan(plan, now)
        self._plan = plan
        self._wake_at(now + self._cost.step_time(StepWork.of(plan)), now)

    def _run_times(self, num_steps: int, num_requests: int, context_len: int, now: float) -> list[float]:
        step_time, times = self._cost.step_time, [now]
        for _ in range(num_steps):
            now += step_time(StepWork(num_requests, context_len))
            times.append(now)
            context_len += num_requests
        return times

    def _cut(self, now: float) -> None:
        """End the run under way with the step that is computed now."""
        times = self._times
        if not times:
            return
        num_begun = max(1, bisect_left(times, now))
        if num_begun >= 2:
            self.core.advance(times[:num_begun], self._next_tokens)
        if num_begun < len(times) - 1:
            self.busy_s -= times[-1] - times[num_begun]
            self._wake_at(times[num_begun])
        self._times = times[num_begun - 1 : num_begun + 1]

    def _next_tokens(self, request: Request, num_tokens: int) -> Sequence[int]:
        return [self._tokens[request.request_id]] * num_tokens

    def _note_recomputed(self, plan: StepPlan) -> None:
        """What the requests that start have to compute again."""
        cost, size = self._chunk_cost, self.core.cache_config.chunk_size
        for start in plan.starts:
            request = self.requests[start.request_id]
            num_known = request.num_tokens - 1 if request.num_suspensions else self._num_known[start.request_id]
            num_tokens, seconds = 0, 0.0
            for begin, end in request.pending:
                num = min(end, num_known) - begin
                if num <= 0:
                    break
                num_tokens += num
                seconds += num * (cost.constant + cost.per_context_token * (begin + num / 2)) / size
            if num_tokens:
                self.num_recomputed_tokens += num_tokens
                self.recompute_s += seconds
                before = self._recomputed.get(start.request_id, (0, 0.0))
                self._recomputed[start.request_id] = before[0] + num_tokens, before[1] + seconds

    # -- slow tiers ----------------------------------------------------------------------------------------------------

    def _start_transfer(self, transfer: SlowTransfer, now: float) -> None:
        source_tier, target_tier = transfer.copy.source_tier, transfer.copy.target_tier
        if self.peer is not None and PEER in (source_tier, target_tier):
            self.peer.start(transfer, now)
            return
        is_load = source_tier in self._links
        link = self._links[source_tier][0] if is_load else self._links[target_tier][1]
        began_s = max(now, link.free_at_s)
        end_s = link.send(self._bytes_per_block, now)
        end = TransferEnd(transfer.transfer_id, True, end_s - began_s)
        self._events.add(end_s, END_OF_TRANSFER, self.end_transfer, end)

    def end_transfer(self, now: float, end: TransferEnd) -> None:
        """A slow transfer has ended."""
        self.run(lambda: self.core.complete_transfer(end, now), now)
