"""A cluster in windows of time: replicas in groups, each of which may be driven by a process of its own.

The parent has what is one for all: sessions between turns, ingresses with their routers, changes of the cluster. A window is
as long as an ingress may go without news of the replicas (LOADS_PERIOD_S). At its beginning all ingresses hear the states of
the replicas; then the parent sends every turn whose time has come, at its exact time, and the groups compute the window.

Any number of groups gives the same figures, because what a replica tells another one, or the parent, waits for the window's
end even if both are in one process. So the figures are those of a cluster without windows, but for this:

- News of the replicas reach all ingresses at the beginnings of windows, and not when a turn finds them too old.
- A turn that follows within the window in which the one before was answered goes on at once at the same replica if the router
  keeps sessions there (Router.keeps_sessions), that replica was the first choice, and the cluster has not changed since.
  Otherwise it is sent at the window's end. So is a turn to the next choice if a replica is full, and the first turn of the
  next session in a closed loop. Each of them comes less than a window late.

Exact are pauses that go beyond the window, retries, and what a lost replica's requests do: these take longer than a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from engine.errors import ConfigError
from engine.simulator.clients import FIRST_ANSWER_STREAM, Client
from engine.simulator.cluster import LOADS_PERIOD_S, LOSS_NOTICED_S, SHUTDOWN_S, Cluster
from engine.simulator.events import ARRIVAL, CHANGE, Events
from engine.simulator.group_processes import GroupRow
from engine.simulator.groups import (
    Drain,
    Ended,
    Forget,
    Gone,
    GroupSpec,
    Lose,
    Message,
    Report,
    Result,
    Send,
    Shed,
    Start,
)
from engine.simulator.outcome import Outcome
from engine.simulator.replica import Replica
from engine.simulator.routing import ReplicaState
from engine.simulator.simulator import SAMPLE_PERIOD_S, Sending, Simulator
from engine.workloads.session import Session


class _DistantClient(Client):
    """A session as the parent knows it: without its context, which is where its turns are computed."""

    __slots__ = ()

    def ask(self, now: float) -> None:
        self.sent_s, self.first_token_s, self.num_retries = now, None, 0


class _DistantReplica:
    """What the parent knows of a replica: its state at the end of the last window."""

    def __init__(self, rank: int, replica_id: int, state: ReplicaState) -> None:
        self.rank = rank
        self.replica_id = replica_id
        self.latest = state
        self.num_open_requests = 0

    def state(self) -> ReplicaState:
        return self.latest


class WindowedSimulator(Simulator):
    """As Simulator, with its replicas in groups."""

    _client_class = _DistantClient
    _replicas: dict[int, _DistantReplica]  # type: ignore[assignment]

    def __init__(
        self,
        cluster: Cluster,
        sessions: Iterable[Session],
        *,
        num_groups: int,
        in_processes: bool = True,
        num_active: int | None = None,
    ) -> None:
        """in_processes: each group is in a process of its own, to which everything in `cluster` but the router can be sent.

        Raises ConfigError if the replicas hand over.
        """
        if cluster.network is not None:
            raise ConfigError(
                "replicas that hand over to each other are simulated in one process; leave `processes` out, or set "
                "kv_handover: off",
                param="processes",
            )
        self._num_groups = num_groups
        self._in_processes = in_processes
        self._posted: list[list[Message]] = [[] for _ in range(num_groups)]
        self._num_changes = 0
        self._new_state = Replica(0, cluster.make_core(), cluster.cost, Events(), lambda *_: None).state()
        # By session: the turn that was sent to the replica that is next to answer; and where the last turn was sent.
        self._sendings: dict[str, Sending] = {}
        self._sent_to: dict[str, int] = {}
        super().__init__(cluster, sessions, num_active=num_active)

    def run(self, until_s: float, on_progress: Callable[[float], None] = lambda now: None) -> Outcome:
        """Simulate until then, or until no session is left."""
        cluster = self._cluster
        spec = GroupSpec(cluster.make_core, cluster.cost, cluster.bytes_per_block, cluster.links)
        begin_s, ended_s, next_sample_s, number = 0.0, 0.0, 0.0, 0
        with GroupRow(spec, self._num_groups, in_processes=self._in_processes) as groups:
            while begin_s < until_s and (self._clients or len(self._events) or any(self._posted)):
                number += 1
                end_s = min(number * LOADS_PERIOD_S, until_s)
                for ingress in self._ingresses:
                    ingress.news_until_s = -1.0
                while self._events.run_next(end_s) is not None:
                    pass
                posted, self._posted = self._posted, [[] for _ in range(self._num_groups)]
                ended_s = max(ended_s, self._take_in(groups.run(posted, self._num_changes, end_s), end_s))
                begin_s = end_s
                if begin_s >= next_sample_s:
                    self._samples.append((begin_s, {r: each.num_open_requests for r, each in self._replicas.items()}))
                    next_sample_s = begin_s + SAMPLE_PERIOD_S
                    on_progress(begin_s)
            is_over = not (self._clients or len(self._events))
            ended_s = ended_s if is_over else until_s
            self._gone += groups.finish(ended_s)
        return Outcome(
            self._turns,
            sorted(self._gone, key=lambda row: (row.rank, row.started_s)),
            self._samples,
            ended_s,
            sum(replica.num_open_requests for replica in self._replicas.values()),
            self._num_refused,
            self._num_too_long,
            self._messages,
        )

    # -- what the groups have done -------------------------------------------------------------------------------------

    def _take_in(self, reports: Sequence[Report], end_s: float) -> float:
        """In order of time. Returns the time of the last result."""
        results = [result for report in reports for result in report.results]
        results.sort(key=lambda result: (result.time_s, result.rank))  # those of one replica stay in their order
        for result in results:
            self._take_result(result, end_s)
        for report in reports:
            for rank, state in report.states.items():
                replica = self._replicas.get(rank)
                if replica is not None and replica.replica_id == state.replica_id:
                    replica.latest, replica.num_open_requests = state, report.num_open[rank]
        return max((result.time_s for result in results), default=0.0)

    def _take_result(self, result: Result, end_s: float) -> None:
        if isinstance(result, Ended):
            self._end_turn(self._clients[result.session_id], result, end_s)
        elif isinstance(result, Gone):
            self._take_gone(result)
        elif isinstance(result, Shed):
            client = self._clients[result.session_id]
            self._retry(result.time_s, client, [client.token] * result.num_given)
        elif result.is_too_long:
            self._num_too_long += 1
            self._end_session(end_s, self._clients[result.session_id])
        else:
            sending = self._sendings.pop(result.session_id, None)
            if sending is None:  # it went on by itself
                self._events.add(end_s, ARRIVAL, self._send_again, (self._clients[result.session_id], None))
            else:
                self._events.add(end_s, ARRIVAL, self._try_next, sending)

    def _end_turn(self, client: Client, ended: Ended, end_s: float) -> None:
        self._turns.append(ended.row)
        client.last_rank = ended.rank
        self._sendings.pop(ended.session_id, None)
        router = self._ingresses[client.ingress].router
        router.note_end(ended.session_id, ended.num_tokens, ended.rank)
        if not client.go_on():
            self._end_session(end_s, client)
        elif ended.goes_on:
            client.ask(ended.time_s + client.turn.pause_s)
        else:
            self._events.add(max(ended.time_s + client.turn.pause_s, end_s), ARRIVAL, self._ask, client)

    def _take_gone(self, gone: Gone) -> None:
        self._gone.append(gone.row)
        if gone.is_lost:
            self._messages.append(f"{gone.time_s:.1f} s: replica {gone.rank} is lost, with {len(gone.lost)} requests")
            self._send_elsewhere(gone)
            return
        replica = self._replicas.get(gone.rank)
        if replica is not None and replica.replica_id == gone.replica_id:  # else it was to be cut off within the window
            del self._replicas[gone.rank], self._draining[gone.rank]

    def _send_elsewhere(self, gone: Gone) -> None:
        for session_id, first_token_s, num_given in gone.lost:
            client = self._clients[session_id]
            client.first_token_s = client.first_token_s if first_token_s is None else first_token_s
            argument = (client, [client.token] * num_given)
            self._events.add(gone.time_s + LOSS_NOTICED_S, ARRIVAL, self._send_again, argument)

    # -- what they are to do -------------------------------------------------------------------------------------------

    def _post(self, message: Message) -> None:
        self._posted[message.rank % self._num_groups].append(message)

    def _end_session(self, now: float, client: Client) -> None:
        self._sendings.pop(client.session.session_id, None)
        self._sent_to.pop(client.session.session_id, None)
        super()._end_session(now, client)

    def _try_next(self, now: float, sending: Sending) -> None:
        client, given = sending.client, sending.output_token_ids
        session_id = client.session.session_id
        is_first, sending.is_begun = not sending.is_begun, True
        rank = next((rank for rank in sending.ranks if rank in self._ranks), None)
        if rank is None:
            self._retry(now, client, given)
            return
        last = self._sent_to.get(session_id, rank)
        if (last - rank) % self._num_groups:
            self._post(Forget(now, last, session_id))
        self._sent_to[session_id] = rank
        self._sendings[session_id] = sending
        keeps_sessions = self._ingresses[client.ingress].router.keeps_sessions
        self._post(
            Send(
                now,
                rank,
                client.session,
                client.answer_token - FIRST_ANSWER_STREAM,
                client.number,
                client.sent_s,
                client.first_token_s,
                client.num_retries,
                client.last_rank,
                len(given) if given else 0,
                self._num_changes,
                keeps_sessions and is_first,
            )
        )

    def _note_ranks(self) -> None:
        super()._note_ranks()
        self._num_changes += 1

    def _start_replica(self, now: float, rank: int | None = None) -> int:
        rank = self._free_rank() if rank is None else rank
        self._num_started += 1
        state = replace(self._new_state, replica_id=self._num_started)
        self._replicas[rank] = _DistantReplica(rank, self._num_started, state)
        self._post(Start(now, rank, self._num_started))
        self._note_ranks()
        return rank

    def _start_drain(self, replica: Replica, now: float) -> None:
        until_s = self._draining[replica.rank] = now + self._cluster.drain_s
        self._note_ranks()
        self._events.add(until_s + SHUTDOWN_S, CHANGE, self._cut_off, replica)
        self._post(Drain(now, replica.rank))

    def _lose(self, replica: Replica, now: float) -> None:
        """What it had is told when the window ends."""
        del self._replicas[replica.rank]
        self._draining.pop(replica.rank, None)
        self._note_ranks()
        self._post(Lose(now, replica.rank))
