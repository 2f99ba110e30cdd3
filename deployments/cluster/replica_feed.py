"""What an engine replica hears of the others from Ray and Serve: a secret that they share, and who runs.

Serve's controller tells it by the long poll by which it tells its routers, whenever the set changes: nothing is asked for a
request.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollNamespace

from deployments.routing.peers import Member
from deployments.routing.session_router import rank_of
from engine.peer_network import PeerNetwork

# Serve writes this logger to the replica's own file.
logger = logging.getLogger("ray.serve")

# In what a replica tells Serve of itself: where it hands KV over.
PEER_ADDRESS = "peer_address"
SECRET_BYTES = 32
KV_NAMESPACE = "pensieve"
# After a question that failed: the controller starts anew; in seconds.
RETRY_S = 1.0


def join_network() -> PeerNetwork:
    """Of the engine replica that runs in this process. Blocks for a moment."""
    replica_id = serve.get_replica_context().replica_id
    secret = shared_secret(replica_id.deployment_id.app_name)
    return PeerNetwork(secret, ray.util.get_node_ip_address(), replica_id.unique_id)


def shared_secret(app_name: str) -> bytes:
    """The secret of an application's replicas, in Ray's control store; the first one that asks makes it.

    It stays when the application is deleted, for one of the same name: a replica that had it, and one that found it gone,
    would refuse each other.
    """
    key = f"{app_name}:peer_secret"
    internal_kv._internal_kv_put(key, secrets.token_bytes(SECRET_BYTES), overwrite=False, namespace=KV_NAMESPACE)
    secret: bytes = internal_kv._internal_kv_get(key, namespace=KV_NAMESPACE)
    return secret


async def follow_replicas(on_members: Callable[[Sequence[Member]], None]) -> None:
    """Tell who runs in this process's deployment, at once, after every change, and now and then; until it is cancelled."""
    key = (LongPollNamespace.DEPLOYMENT_TARGETS, serve.get_replica_context().replica_id.deployment_id)
    snapshot_id = -1
    members: list[Member] = []
    while True:
        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            answer: Any = await controller.listen_for_change.remote({key: snapshot_id})
        except (RayError, ValueError) as error:  # ValueError: there is no controller
            logger.debug("Serve's controller does not tell which replicas run: %r", error)
            await asyncio.sleep(RETRY_S)
            continue
        if isinstance(answer, dict) and key in answer:  # else nothing changed for a while
            snapshot_id = answer[key].snapshot_id
            members = [_member(replica) for replica in answer[key].object_snapshot.running_replicas]
        on_members(members)


def _member(replica: Any) -> Member:
    address = replica.replica_metadata.get(PEER_ADDRESS)
    return Member(replica.replica_id.unique_id, rank_of(replica), None if address is None else tuple(address))
