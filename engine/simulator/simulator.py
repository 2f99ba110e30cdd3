"""A cluster and its clients, by events: turns are sent, routed, computed and answered; replicas come, go and fail.

Client.ask -> Router.place -> (Peer.ask) -> Replica.add ... Replica's steps ... on_end -> pause -> Client.ask
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from engine.core.engine_core import RequestOutput
from engine.core.plan import ChunkRecord, StepPlan
from engine.core.request import Request
from engine.core.reuse import Reuse
from engine.errors import ContextLengthError, OverloadedError
from engine.simulator.clients import Client, turn_row
from engine.simulator.cluster import (
    LEAVE_S,
    LOADS_PERIOD_S,
    LOSS_NOTICED_S,
    RETRY_AFTER_S,
    SHUTDOWN_S,
    Change,
    Cluster,
    make_links,
)
from engine.simulator.events import ARRIVAL, CHANGE, Events
from engine.simulator.handover import Peer
from engine.simulator.hints import Hints
from engine.simulator.network import Network
from engine.simulator.oracle import Oracle
from engine.simulator.outcome import Outcome, ReplicaRow, TurnTable
from engine.simulator.replica import Replica
from engine.simulator.routing import Router
from engine.workloads.session import Session

# How often the loads are noted for the report.
SAMPLE_PERIOD_S = 1.0


class Ingress:
    """One router, and until when its news of the replicas hold."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.news_until_s = -1.0


class Sending:
    """A turn on its way to a replica. ranks: of those that may still be asked. is_begun: one of them was asked."""

    def __init__(self, client: Client, output_token_ids: list[int] | None, ranks: Iterable[int]) -> None:
        self.client = client
        self.output_token_ids = output_token_ids
        self.ranks = iter(ranks)
        self.is_begun = False


class Simulator:
    """One run of one cluster with one workload."""

    _client_class: type[Client] = Client

    def __init__(
        self,
        cluster: Cluster,
        sessions: Iterable[Session],
        *,
        num_active: int | None = None,
        reuse_of: Callable[[Session, int], Reuse] | None = None,
        oracle: Oracle | None = None,
        on_plan: Callable[[StepPlan, float], None] | None = None,
    ) -> None:
        """sessions: in order of their start times; drawn one at a time.

        num_active: so many sessions are under way at any time, whatever their start times; None = these count.
        reuse_of: what the request of a session's turn of that number says of the next use of its context.
        oracle: is told when turns begin and end, and knows what of a prompt was computed before, by any session.
        on_plan: is told each plan that a replica makes, and when; it takes longer, because all are made then.
        """
        self._cluster = cluster
        self._sessions: Iterator[Session] = iter(sessions)
        self._on_plan = on_plan
        self._reuse_of = reuse_of
        self._oracle = oracle
        self._is_closed = num_active is not None
        self._events = Events()
        self._replicas: dict[int, Replica] = {}
        self._started_s: dict[int, float] = {}
        self._num_started = 0
        self._draining: dict[int, float] = {}  # rank: until when it hands over
        self._ranks: tuple[int, ...] = ()
        routers = [cluster.router, *(cluster.router.another() for _ in range(cluster.num_ingresses - 1))]
        self._ingresses = [Ingress(router) for router in routers]
        self._num_sent = 0
        self._network: Network | None = None
        if cluster.network is not None:
            self._network = Network(cluster.network, self._events, cluster.bytes_per_block)
        self._clients: dict[str, Client] = {}
        self._num_sessions = 0
        self._turns = TurnTable()
        self._gone: list[ReplicaRow] = []
        self._samples: list[tuple[float, dict[int, int]]] = []
        self._messages: list[str] = []
        self._num_refused = self._num_too_long = 0
        for _ in range(cluster.num_replicas):
            self._start_replica(0.0)
        self._hints = Hints(cluster.kv_hints)
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
            self._stop_replica(rank, ended_s)
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
        client = self._client_class(session, self._num_sessions)
        self._num_sessions += 1
        self._events.add(now if self._is_closed else max(now, session.start_s), ARRIVAL, self._begin_session, client)

    def _begin_session(self, now: float, client: Client) -> None:
        if not self._is_closed:
            self._start_next_session(now)
        self._clients[client.session.session_id] = client
        self._ask(now, client)

    def _ask(self, now: float, client: Client) -> None:
        client.ask(now)
        if self._oracle is not None:
            client.num_seen = max(client.num_known, self._oracle.begin_turn(client.session.session_id))
        self._hints.note_ask(client, now)
        self._send(now, client)

    def _send(self, now: float, client: Client, output_token_ids: list[int] | None = None) -> None:
        """Ask the replicas that the router names, one after the other; later again if all of them are full."""
        client.ingress = self._num_sent % len(self._ingresses)
        self._num_sent += 1
        ranks: Sequence[int] = ()
        if self._ranks:
            router = self._informed_router(client.ingress, now)
            ranks = router.place(client.session.session_id, client.number == 0, self._ranks)
        self._try_next(now, Sending(client, output_token_ids, ranks))

    def _try_next(self, now: float, sending: Sending) -> None:
        """Ask the next replica, which asks a peer first for what the session has there."""
        client = sending.client
        for rank in sending.ranks:
            replica = self._replicas.get(rank)
            if replica is None:  # it has gone while another one was asked
                continue
            request = client.request(replica.core.cache_config.chunk_size, sending.output_token_ids)
            if self._reuse_of is not None:
                request.reuse = self._reuse_of(client.session, client.number)
            request.retention = self._hints.hint_of(client)
            then = partial(self._add_expecting, replica, request, sending)
            if replica.peer is not None and replica.peer.ask(request, now, then):
                return
            if self._try_add(now, replica, request, client):
                return
        self._retry(now, client, sending.output_token_ids)

    def _add_expecting(
        self, replica: Replica, request: Request, sending: Sending, now: float, records: Sequence[ChunkRecord]
    ) -> None:
        """A peer has told what it has of the request's context."""
        client = sending.client
        is_ending = replica.peer is not None and replica.peer.is_draining
        if self._replicas.get(replica.rank) is not replica or is_ending:
            self._events.add(now + LOSS_NOTICED_S, ARRIVAL, self._send_again, (client, sending.output_token_ids))
        elif not self._try_add(now, replica, request, client):
            self._try_next(now, sending)
        elif records and replica.core.handover is not None and request.request_id in replica.requests:
            replica.core.handover.expect(records, request.request_id, now)

    def _try_add(self, now: float, replica: Replica, request: Request, client: Client) -> bool:
        """Whether the replica has taken the request, or the session has ended with it."""
        try:
            shed = replica.add(request, client.token, client.num_seen, now)
        except OverloadedError:
            return False
        except ContextLengthError:
            self._num_too_long += 1
            self._end_session(now, client)
            return True
        for other in shed:
            self._retry(now, self._clients[other.conversation_id], other.token_ids[other.num_prompt_tokens :])
        return True

    def _retry(self, now: float, client: Client, output_token_ids: list[int] | None) -> None:
        client.num_retries += 1
        self._num_refused += 1
        self._events.add(now + RETRY_AFTER_S, ARRIVAL, self._send_again, (client, output_token_ids))

    def _send_again(self, now: float, argument: tuple[Client, list[int] | None]) -> None:
        self._send(now, *argument)

    def _on_end(self, replica: Replica, request: Request, output: RequestOutput, now: float) -> None:
        client = self._clients[request.conversation_id]
        self._turns.append(turn_row(client, replica, output, now))
        client.last_rank = replica.rank
        self._hints.note_end(client, request, replica.core, now)
        router = self._ingresses[client.ingress].router
        router.note_end(client.session.session_id, request.num_tokens, replica.rank)
        if replica.peer is not None:
            ranks = router.next_choices(client.session.session_id, self._ranks) if self._ranks else ()
            replica.peer.note(request, now, {self._replicas[rank].replica_id for rank in ranks})
        if self._oracle is not None:
            self._oracle.end_turn(client.session.session_id, now)
        if client.end_turn(request):
            self._events.add(now + client.turn.pause_s, ARRIVAL, self._ask, client)
        else:
            self._end_session(now, client)
        if replica.rank in self._draining and not replica.num_open_requests:
            self._end_drain(replica, now)

    def _end_session(self, now: float, client: Client) -> None:
        session_id = client.session.session_id
        del self._clients[session_id]
        for ingress in self._ingresses:
            ingress.router.forget(session_id)
        if self._network is not None:
            self._network.directory.forget(session_id)
        if self._is_closed:
            self._start_next_session(now)

    # -- replicas ------------------------------------------------------------------------------------------------------

    def _informed_router(self, number: int, now: float) -> Router:
        """The router of an ingress, with news that are at most LOADS_PERIOD_S old."""
        ingress = self._ingresses[number]
        if now >= ingress.news_until_s:
            ingress.router.hear({rank: self._replicas[rank].state() for rank in self._ranks}, now)
            ingress.news_until_s = now + LOADS_PERIOD_S
        return ingress.router

    def _start_replica(self, now: float, rank: int | None = None) -> int:
        cluster = self._cluster
        if rank is None:
            rank = self._free_rank()
        self._num_started += 1
        replica = self._replicas[rank] = Replica(
            rank,
            cluster.make_core(),
            cluster.cost,
            self._events,
            self._on_end,
            make_links(cluster.links),
            cluster.bytes_per_block,
            self._on_plan,
            self._num_started,
        )
        if self._network is not None:
            replica.peer = Peer(replica.replica_id, replica, self._network, now)
        self._started_s[rank] = now
        self._note_ranks()
        return rank

    def _free_rank(self) -> int:
        return next(number for number in range(len(self._replicas) + 1) if number not in self._replicas)

    def _end_replica(self, rank: int, now: float) -> None:
        replica = self._stop_replica(rank, now)
        self._draining.pop(rank, None)
        self._note_ranks()
        if self._network is not None:
            self._network.leave(replica.replica_id, now)

    def _stop_replica(self, rank: int, now: float) -> Replica:
        replica = self._replicas.pop(rank)
        replica.stop()
        self._gone.append(replica.row(self._started_s.pop(rank), now))
        return replica

    def _note_ranks(self) -> None:
        self._ranks = tuple(sorted(self._replicas.keys() - self._draining.keys()))
        for ingress in self._ingresses:
            ingress.news_until_s = -1.0

    def _change(self, now: float, change: Change) -> None:
        rank = change.rank
        if change.what == "add":
            self._events.add(now + change.start_s, CHANGE, self._add_replica, None)
        elif rank not in self._replicas or rank in self._draining:
            self._messages.append(f"{now:.1f} s: no replica {rank} to {change.what}")
        elif change.what == "drain":
            self._messages.append(f"{now:.1f} s: replica {rank} drains")
            self._start_drain(self._replicas[rank], now)
        else:
            self._lose(self._replicas[rank], now)
            self._events.add(now + change.restart_s, CHANGE, self._restart, rank)

    def _lose(self, replica: Replica, now: float) -> None:
        """Its requests go on elsewhere, from the last token that they got."""
        lost = replica.fail(now)
        self._messages.append(f"{now:.1f} s: replica {replica.rank} is lost, with {len(lost)} requests")
        self._end_replica(replica.rank, now)
        for request in lost:
            client = self._clients[request.conversation_id]
            client.first_token_s = client.first_token_s if request.first_token_s is None else request.first_token_s
            beginning = request.token_ids[request.num_prompt_tokens :]
            self._events.add(now + LOSS_NOTICED_S, ARRIVAL, self._send_again, (client, beginning))

    def _add_replica(self, now: float, _: None) -> None:
        self._messages.append(f"{now:.1f} s: replica {self._start_replica(now)} is added")

    def _start_drain(self, replica: Replica, now: float) -> None:
        """It takes no more requests, and soon begins to hand over, beside its last ones."""
        until_s = self._draining[replica.rank] = now + self._cluster.drain_s
        self._note_ranks()
        self._events.add(until_s + SHUTDOWN_S, CHANGE, self._cut_off, replica)
        if replica.peer is not None:
            self._events.add(now + LEAVE_S, CHANGE, self._hand_over, replica)
            self._events.add(until_s, CHANGE, self._end_hand_over, replica)
        if not replica.num_open_requests:
            self._end_drain(replica, now)

    def _hand_over(self, now: float, replica: Replica) -> None:
        """Within the rate that is allowed."""
        if self._replicas.get(replica.rank) is replica and replica.num_open_requests and replica.peer is not None:
            replica.peer.offer_all(now, self._next_peer, lambda now: None)

    def _end_drain(self, replica: Replica, now: float) -> None:
        """It has no requests any more: the rest is handed over as fast as possible."""
        peer = replica.peer
        if peer is None or now >= self._draining[replica.rank]:
            self._end_replica(replica.rank, now)
        elif not peer.is_draining:
            replica.core.start_drain(now)
            peer.start_drain()
            peer.offer_all(now, self._next_peer, lambda now: self._end_hand_over(now, replica))

    def _end_hand_over(self, now: float, replica: Replica) -> None:
        """All that is wanted of it has gone, or its time is over."""
        is_here = self._replicas.get(replica.rank) is replica
        if is_here and not replica.num_open_requests:
            self._messages.append(f"{now:.1f} s: replica {replica.rank} has handed over and ends")
            self._end_replica(replica.rank, now)

    def _cut_off(self, now: float, replica: Replica) -> None:
        """A replica that drains gets no more time."""
        if self._replicas.get(replica.rank) is replica:
            self._lose(replica, now)

    def _next_peer(self, session_id: str) -> int | None:
        """The replica that gets a session when its own one has ended."""
        rank = self._ingresses[0].router.next_home(session_id, self._ranks) if self._ranks else None
        return None if rank is None else self._replicas[rank].replica_id

    def _restart(self, now: float, rank: int) -> None:
        if rank not in self._replicas:
            self._start_replica(now, rank)
            self._messages.append(f"{now:.1f} s: replica {rank} is back, empty")
