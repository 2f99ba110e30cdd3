"""Some replicas of a cluster, and the turns that are at them: what one process of a simulation drives.

It is told what comes to its replicas in a window of time, computes the window, and tells what came of it. Knows no router,
and no replica of another group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.request import Request
from engine.errors import ContextLengthError, OverloadedError
from engine.simulator.clients import Client, turn_row
from engine.simulator.cluster import LinkSpec, make_links
from engine.simulator.events import ARRIVAL, CHANGE, Events
from engine.simulator.outcome import ReplicaRow, TurnRow
from engine.simulator.replica import Replica
from engine.simulator.routing import ReplicaState
from engine.simulator.step_cost import StepCost
from engine.workloads.session import Session


class Start(NamedTuple):
    """A replica begins, empty."""

    time_s: float
    rank: int
    replica_id: int


class Drain(NamedTuple):
    """The replica ends when it has no requests any more; none comes from now on."""

    time_s: float
    rank: int


class Lose(NamedTuple):
    """The replica is lost, with the step under way."""

    time_s: float
    rank: int


class Forget(NamedTuple):
    """A session goes on elsewhere: what is remembered of it here is of no use."""

    time_s: float
    rank: int
    session_id: str


class Send(NamedTuple):
    """A turn arrives at a replica. The fields of the client are as in Client.

    session_number: counts up over all sessions. num_given: tokens of the answer that are known.
    num_changes: of the cluster, until now. goes_on_here: turns that follow within the window are for this replica, too, as
    long as the cluster does not change.
    """

    time_s: float
    rank: int
    session: Session
    session_number: int
    number: int
    sent_s: float
    first_token_s: float | None
    num_retries: int
    last_rank: int | None
    num_given: int
    num_changes: int
    goes_on_here: bool


class Ended(NamedTuple):
    """A turn was answered. goes_on: the next one has been sent here, or will be within the window."""

    time_s: float
    rank: int
    session_id: str
    row: TurnRow
    num_tokens: int
    goes_on: bool


class NotTaken(NamedTuple):
    """The replica refused a turn, because it is full; or for ever, because the turn is too long."""

    time_s: float
    rank: int
    session_id: str
    is_too_long: bool


class Shed(NamedTuple):
    """A waiting turn was dropped for another one's tenant."""

    time_s: float
    rank: int
    session_id: str
    num_given: int


class Gone(NamedTuple):
    """A replica has ended. lost: (session, when its first token came, tokens given) of the turns that it had.

    is_lost: it was lost; else it has drained.
    """

    time_s: float
    rank: int
    row: ReplicaRow
    replica_id: int
    is_lost: bool
    lost: Sequence[tuple[str, float | None, int]]


Message = Start | Drain | Lose | Forget | Send
Result = Ended | NotTaken | Shed | Gone


class Report(NamedTuple):
    """What came of a window. states, num_open: of the replicas that there are at its end, by rank."""

    results: list[Result]
    states: Mapping[int, ReplicaState]
    num_open: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What all replicas have in common; see Cluster."""

    make_core: Callable[[], EngineCore]
    cost: StepCost
    bytes_per_block: float
    links: tuple[tuple[str, LinkSpec], ...]


class Group:
    """Replicas by rank, their events, and the contexts of the sessions that have been there."""

    def __init__(self, spec: GroupSpec) -> None:
        self._spec = spec
        self._events = Events()
        self._replicas: dict[int, Replica] = {}
        self._started_s: dict[int, float] = {}
        self._draining: set[int] = set()
        self._clients: dict[str, Client] = {}
        self._stays: dict[str, int | None] = {}  # by session: as long as so many changes have been; None = it does not
        self._num_changes = 0
        self._results: list[Result] = []
        self._end_s = 0.0

    def run(self, messages: Sequence[Message], num_changes: int, end_s: float) -> Report:
        """Everything before `end_s`.

        messages: of times from the end of the last window on, in the order in which they were sent.
        num_changes: of the cluster, until `end_s`.
        """
        self._end_s, self._num_changes = end_s, num_changes
        for message in messages:
            if isinstance(message, Send):
                self._events.add(message.time_s, ARRIVAL, self._take, message)
            else:
                self._events.add(message.time_s, CHANGE, self._change, message)
        while self._events.run_next(end_s) is not None:
            pass
        results, self._results = self._results, []
        states = {rank: replica.state() for rank, replica in self._replicas.items()}
        return Report(results, states, {rank: each.num_open_requests for rank, each in self._replicas.items()})

    def finish(self, ended_s: float) -> list[ReplicaRow]:
        """What the replicas that are left have done."""
        return [replica.row(self._started_s[rank], ended_s) for rank, replica in self._replicas.items()]

    # -- turns ---------------------------------------------------------------------------------------------------------

    def _take(self, now: float, send: Send) -> None:
        session_id = send.session.session_id
        client = self._clients.get(session_id)
        if client is None or client.number != send.number:
            client = self._clients[session_id] = Client(send.session, send.session_number)
            client.number = send.number
        if not client.is_asked:
            client.ask(send.sent_s)
        client.sent_s, client.first_token_s = send.sent_s, send.first_token_s
        client.num_retries, client.last_rank = send.num_retries, send.last_rank
        self._stays[session_id] = send.num_changes if send.goes_on_here else None
        self._add(now, self._replicas[send.rank], client, [client.token] * send.num_given)

    def _take_next(self, now: float, argument: tuple[Replica, Client]) -> None:
        """The turn behind one that was answered in this window."""
        replica, client = argument
        client.ask(now)
        self._add(now, replica, client, [])

    def _add(self, now: float, replica: Replica, client: Client, given: list[int]) -> None:
        session_id, rank = client.session.session_id, replica.rank
        request = client.request(replica.core.cache_config.chunk_size, given)
        try:
            shed = replica.add(request, client.token, client.num_seen, now)
        except (OverloadedError, ContextLengthError) as error:
            is_too_long = isinstance(error, ContextLengthError)
            self._results.append(NotTaken(now, rank, session_id, is_too_long))
            if is_too_long:
                self._forget(session_id)
            return
        for other in shed:
            self._results.append(Shed(now, rank, other.conversation_id, other.num_output_tokens))

    def _on_end(self, replica: Replica, request: Request, output: RequestOutput, now: float) -> None:
        session_id, rank = request.conversation_id, replica.rank
        client = self._clients[session_id]
        row = turn_row(client, replica, output, now)
        client.last_rank = rank
        has_more = client.end_turn(request)
        goes_on = has_more and self._stays[session_id] == self._num_changes and now + client.turn.pause_s < self._end_s
        self._results.append(Ended(now, rank, session_id, row, request.num_tokens, goes_on))
        if goes_on:
            self._events.add(now + client.turn.pause_s, ARRIVAL, self._take_next, (replica, client))
        elif not has_more:
            self._forget(session_id)
        if rank in self._draining and not replica.num_open_requests:
            self._end(replica, now)

    def _forget(self, session_id: str) -> None:
        self._clients.pop(session_id, None)
        self._stays.pop(session_id, None)

    # -- replicas ------------------------------------------------------------------------------------------------------

    def _change(self, now: float, message: Message) -> None:
        if isinstance(message, Forget):
            self._forget(message.session_id)
        elif isinstance(message, Start):
            self._start(message)
        elif (replica := self._replicas.get(message.rank)) is None:
            pass  # it drained, and has ended meanwhile
        elif isinstance(message, Drain):
            self._draining.add(message.rank)
            if not replica.num_open_requests:
                self._end(replica, now)
        else:
            self._end(replica, now, replica.fail(now), is_lost=True)

    def _start(self, start: Start) -> None:
        spec = self._spec
        self._replicas[start.rank] = Replica(
            start.rank,
            spec.make_core(),
            spec.cost,
            self._events,
            self._on_end,
            make_links(spec.links),
            spec.bytes_per_block,
            replica_id=start.replica_id,
        )
        self._started_s[start.rank] = start.time_s

    def _end(self, replica: Replica, now: float, lost: Sequence[Request] = (), *, is_lost: bool = False) -> None:
        del self._replicas[replica.rank]
        self._draining.discard(replica.rank)
        replica.stop()
        row = replica.row(self._started_s.pop(replica.rank), now)
        turns = [(each.conversation_id, each.first_token_s, each.num_output_tokens) for each in lost]
        self._results.append(Gone(now, replica.rank, row, replica.replica_id, is_lost, turns))
