"""A cluster and its clients, by events: turns are sent, routed, computed and answered; replicas come, go and fail.

Client.ask -> Router.place -> Replica.add ... Replica's steps ... on_end -> pause -> Client.ask
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.plan import StepPlan
from engine.core.request import Request
from engine.errors import ContextLengthError, OverloadedError
from engine.simulator.clients import Client
from engine.simulator.events import ARRIVAL, CHANGE, Events
from engine.simulator.links import Link
from engine.simulator.outcome import Outcome, ReplicaRow, TurnRow, TurnTable
from engine.simulator.replica import Replica
from engine.simulator.routing import Router
from engine.simulator.step_cost import StepCost
from engine.workloads.session import Session

# As live: how old an ingress lets the loads of the replicas become, how soon a client asks again if all that were asked are
# full, and how soon a lost replica's requests are sent elsewhere.
LOADS_PERIOD_S = 0.5
RETRY_AFTER_S = 2.0
LOSS_NOTICED_S = 1.0
# How often the loads are noted for the report.
SAMPLE_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A slow tier's way to the CPU tier, for each replica: bytes a second in each direction, and seconds."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happens to the cluster.

    add: one more replica, with the lowest rank that is free. drain: the replica of that rank takes no more requests, and goes
    when it has none. lose: it is gone at once; another one takes its rank after `restart_s`, empty.
    """

    time_s: float
    what: Literal["add", "drain", "lose"]
    rank: int = 0
    restart_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What is simulated.

    make_core: an engine core for one replica. cost: of its steps. bytes_per_block: of all tiers. links: by slow tier.
    """

    make_core: Callable[[], EngineCore]
    cost: StepCost
    router: Router
    num_replicas: int = 1
    bytes_per_block: float = 0.0
    links: tuple[tuple[str, LinkSpec], ...] = ()
    changes: tuple[Change, ...] = ()


class Simulator:
    """One run of one cluster with one workload."""

    def __init__(
        self,
        cluster: Cluster,
        sessions: Iterable[Session],
        *,
        num_active: int | None = None,
        on_plan: Callable[[StepPlan, float], None] | None = None,
    ) -> None:
        """sessions: in order of their start times; drawn one at a time.

        num_active: so many sessions are under way at any time, whatever their start times; None = these count.
        on_plan: is told each plan that a replica makes, and when; it takes longer, because all are made then.
        """
        self._cluster = cluster
        self._sessions: Iterator[Session] = iter(sessions)
        self._on_plan = on_plan
        self._is_closed = num_active is not None
        self._events = Events()
        self._replicas: dict[int, Replica] = {}
        self._started_s: dict[int, float] = {}
        self._draining: set[int] = set()
        self._ranks: list[int] = []
        self._loads: dict[int, int] = {}
        self._loads_until_s = -1.0
        self._clients: dict[str, Client] = {}
        self._num_sessions = 0
        self._turns = TurnTable()
        self._gone: list[ReplicaRow] = []
        self._samples: list[tuple[float, dict[int, int]]] = []
        self._messages: list[str] = []
        self._num_refused = self._num_too_long = 0
        for _ in range(cluster.num_replicas):
            self._start_replica(0.0)
        for change in cluster.changes:
            self._events.add(change.time_s, CHANGE, self._change, change)
        for _ in range(num_active or 1):
            self._start_next_session(0.0)

    def run(self, until_s: float, on_progress: Callable[[float], None] = lambda now: None) -> Outcome:
        """Simulate until then, or until no session is left."""
        now, next_sample_s = 0.0, 0.0
        run_next = self._events.run_next
        while (time_s := run_next(until_s)) is not None:
            now = time_s
            if now >= next_sample_s:
                self._samples.append((now, {rank: each.num_open_requests for rank, each in self._replicas.items()}))
                next_sample_s = now + SAMPLE_PERIOD_S
                on_progress(now)
        ended_s = until_s if len(self._events) else now
        num_unfinished = sum(replica.num_open_requests for replica in self._replicas.values())
        for rank in list(self._replicas):
            self._end_replica(rank, ended_s)
        return Outcome(
            self._turns,
            sorted(self._gone, key=lambda row: (row.rank, row.started_s)),
            self._samples,
            ended_s,
            num_unfinished,
            self._num_refused,
            self._num_too_long,
            self._messages,
        )

    # -- sessions ------------------------------------------------------------------------------------------------------

    def _start_next_session(self, now: float) -> None:
        session = next(self._sessions, None)
        if session is None:
            return
        client = Client(session, self._num_sessions)
        self._num_sessions += 1
        self._events.add(now if self._is_closed else max(now, session.start_s), ARRIVAL, self._begin_session, client)

    def _begin_session(self, now: float, client: Client) -> None:
        if not self._is_closed:
            self._start_next_session(now)
        self._clients[client.session.session_id] = client
        self._ask(now, client)

    def _ask(self, now: float, client: Client) -> None:
        client.ask(now)
        self._send(now, client)

    def _send(self, now: float, client: Client, output_token_ids: list[int] | None = None) -> None:
        """Ask the replicas that the router names, one after the other; later again if all of them are full."""
        session = client.session
        ranks = self._ranks
        for rank in (
            self._cluster.router.place(session.session_id, client.number == 0, ranks, self._known_loads(now))
            if ranks
            else ()
        ):
            replica = self._replicas[rank]
            request = client.request(replica.core.cache_config.chunk_size, output_token_ids)
            try:
                shed = replica.add(request, client.token, client.num_known, now)
            except OverloadedError:
                continue
            except ContextLengthError:
                self._num_too_long += 1
                self._end_session(now, client)
                return
            self._loads[rank] = self._loads.get(rank, 0) + 1
            for other in shed:
                self._retry(now, self._clients[other.conversation_id], other.token_ids[other.num_prompt_tokens :])
            return
        self._retry(now, client, output_token_ids)

    def _retry(self, now: float, client: Client, output_token_ids: list[int] | None) -> None:
        client.num_retries += 1
        self._num_refused += 1
        self._events.add(now + RETRY_AFTER_S, ARRIVAL, self._send_again, (client, output_token_ids))

    def _send_again(self, now: float, argument: tuple[Client, list[int] | None]) -> None:
        self._send(now, *argument)

    def _on_end(self, replica: Replica, request: Request, output: RequestOutput, now: float) -> None:
        client, stats = self._clients[request.conversation_id], output.stats
        assert stats is not None
        assert stats.first_token_s is not None
        self._turns.append(
            TurnRow(
                client.answer_token,
                client.number,
                int(client.turn.kind == "tool"),
                replica.rank,
                client.sent_s,
                stats.first_token_s if client.first_token_s is None else client.first_token_s,
                now,
                stats.num_prompt_tokens,
                client.num_known,
                stats.num_cached_tokens,
                stats.num_loaded_tokens,
                stats.num_not_loaded_tokens,
                stats.num_dropped_tokens,
                stats.num_new_tokens,
                stats.num_output_tokens,
                stats.num_suspensions,
                client.num_retries,
            )
        )
        if client.end_turn(request):
            self._events.add(now + client.turn.pause_s, ARRIVAL, self._ask, client)
        else:
            self._end_session(now, client)
        if replica.rank in self._draining and not replica.num_open_requests:
            self._end_replica(replica.rank, now)

    def _end_session(self, now: float, client: Client) -> None:
        del self._clients[client.session.session_id]
        self._cluster.router.forget(client.session.session_id)
        if self._is_closed:
            self._start_next_session(now)

    # -- replicas ------------------------------------------------------------------------------------------------------

    def _known_loads(self, now: float) -> dict[int, int]:
        """As an ingress knows them: what it heard at most LOADS_PERIOD_S ago, and what it has sent since."""
        if now >= self._loads_until_s:
            self._loads = {rank: self._replicas[rank].num_open_requests for rank in self._ranks}
            self._loads_until_s = now + LOADS_PERIOD_S
        return self._loads

    def _start_replica(self, now: float, rank: int | None = None) -> int:
        cluster = self._cluster
        if rank is None:
            rank = next(number for number in range(len(self._replicas) + 1) if number not in self._replicas)
        links = {
            name: (Link(spec.read_bytes_per_s, spec.latency_s), Link(spec.write_bytes_per_s, spec.latency_s))
            for name, spec in cluster.links
        }
        self._replicas[rank] = Replica(
            rank,
            cluster.make_core(),
            cluster.cost,
            self._events,
            self._on_end,
            links,
            cluster.bytes_per_block,
            self._on_plan,
        )
        self._started_s[rank] = now
        self._note_ranks()
        return rank

    def _end_replica(self, rank: int, now: float) -> None:
        replica = self._replicas.pop(rank)
        self._draining.discard(rank)
        self._gone.append(
            ReplicaRow(
                rank,
                self._started_s.pop(rank),
                now,
                replica.busy_s,
                replica.recompute_s,
                replica.num_recomputed_tokens,
                replica.core.get_statistics(),
            )
        )
        self._note_ranks()

    def _note_ranks(self) -> None:
        self._ranks = sorted(self._replicas.keys() - self._draining)
        self._loads_until_s = -1.0

    def _change(self, now: float, change: Change) -> None:
        rank = change.rank
        if change.what == "add":
            self._messages.append(f"{now:.1f} s: replica {self._start_replica(now)} is added")
        elif rank not in self._replicas or rank in self._draining:
            self._messages.append(f"{now:.1f} s: no replica {rank} to {change.what}")
        elif change.what == "drain":
            self._messages.append(f"{now:.1f} s: replica {rank} drains")
            self._draining.add(rank)
            self._note_ranks()
            if not self._replicas[rank].num_open_requests:
                self._end_replica(rank, now)
        else:
            lost = self._replicas[rank].fail(now)
            self._messages.append(f"{now:.1f} s: replica {rank} is lost, with {len(lost)} requests")
            self._end_replica(rank, now)
            for request in lost:
                client = self._clients[request.conversation_id]
                client.first_token_s = client.first_token_s if request.first_token_s is None else request.first_token_s
                beginning = request.token_ids[request.num_prompt_tokens :]
                self._events.add(now + LOSS_NOTICED_S, ARRIVAL, self._send_again, (client, beginning))
            self._events.add(now + change.restart_s, CHANGE, self._restart, rank)

    def _restart(self, now: float, rank: int) -> None:
        if rank not in self._replicas:
            self._start_replica(now, rank)
            self._messages.append(f"{now:.1f} s: replica {rank} is back, empty")
