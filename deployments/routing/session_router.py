"""Serve's request router for engine replicas: rendezvous hashing on the replica's rank.

A replacement takes the rank of the replica that died, so the other sessions stay where they are. Sees no request body;
what it remembers is for counting its decisions, and decides nothing. Session ids come as `rendezvous.routing_name`
writes them.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.metric_definitions import ROUTER_DECISIONS, make_metric
from deployments.routing.decisions import RouterDecisions
from deployments.routing.rendezvous import rank_replicas, read_routing_name

RANK = "rank"


class SessionRouter(RequestRouter):
    """Prefers the session's home.

    The next replica in the session's order is asked when the engine of the one before has rejected the request because
    its queue is full, or when Serve finds that replica at `max_ongoing_requests`.
    """

    # How long to wait for a replica's word on its queue, in seconds. Serve's 0.1 is missed by a replica that
    # is busy computing, and then the session would move away from its cache. A dead replica fails at once,
    # whatever this is.
    queue_len_response_deadline_s = 2.0

    def initialize_state(self, num_fallback_replicas: int = 1) -> None:
        """num_fallback_replicas: how many replicas besides its home a session may go to."""
        self._num_choices = 1 + num_fallback_replicas
        self._decisions = RouterDecisions()
        self._counter = make_metric(ROUTER_DECISIONS)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        metadata = pending_request.metadata
        replicas = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        session_id, num_refusals = metadata.internal_request_id, 0
        if metadata.session_id:
            session_id, num_refusals = read_routing_name(metadata.session_id)
        order = rank_replicas(session_id, [rank_of(r) for r in replicas])[: self._num_choices]
        return [[replicas[index]] for index in order[num_refusals:] or order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Serve calls this once the replica has accepted the request."""
        name = pending_request.metadata.session_id
        chosen = self.curr_replicas.get(replica_id)
        if not name or chosen is None:
            return
        session_id, _ = read_routing_name(name)
        ranks = [rank_of(replica) for replica in self.curr_replicas.values()]
        home_rank = ranks[rank_replicas(session_id, ranks)[0]]
        decision = self._decisions.classify(session_id, home_rank, rank_of(chosen))
        self._counter.inc(tags={"kind": decision})


def rank_of(replica: RunningReplica) -> int:
    """The rank of a replica, as far as Serve has told."""
    # Serve closes gaps in the ranks after a scale-down: the periodic statistics know, the metadata are from
    # the start.
    return int(replica.routing_stats.get(RANK, replica.replica_metadata[RANK]))
