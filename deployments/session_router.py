"""Serve's request router for engine replicas: rendezvous hashing on the replica's rank. A replacement takes
the rank of the replica that died, so the other sessions stay where they are. Sees no request body; what it
remembers is for counting its decisions, and decides nothing.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.metrics import ROUTER_DECISIONS, make_metric
from deployments.rendezvous import rank_replicas
from deployments.router_decisions import RouterDecisions

RANK = "rank"


class SessionRouter(RequestRouter):
    """Prefers the session's home; Serve takes the next one of the order when that is at `max_ongoing_requests`."""

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
        order = rank_replicas(metadata.session_id or metadata.internal_request_id, [_replica_rank(r) for r in replicas])
        return [[replicas[index]] for index in order[: self._num_choices]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Serve calls this once the replica has accepted the request."""
        session_id = pending_request.metadata.session_id
        chosen = self.curr_replicas.get(replica_id)
        if not session_id or chosen is None:
            return
        ranks = [_replica_rank(replica) for replica in self.curr_replicas.values()]
        home_rank = ranks[rank_replicas(session_id, ranks)[0]]
        decision = self._decisions.classify(session_id, home_rank, _replica_rank(chosen))
        self._counter.inc(tags={"kind": decision})


def _replica_rank(replica: RunningReplica) -> int:
    # Serve closes gaps in the ranks after a scale-down: the periodic statistics know, the metadata are from
    # the start.
    return int(replica.routing_stats.get(RANK, replica.replica_metadata[RANK]))
