"""The resources that a replica, or its tensor-parallel group, asks Ray for, and why it has not got them.

Starts nothing and reserves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.serve.request_router import ReplicaID

from deployments.options import ReplicaOptions

Resources = Mapping[str, float]

# Nodes that a message names, the freest first.
MAX_NODES_NAMED = 8
# Of a placement group for which Ray has still to find nodes, or has to again.
UNPLACED_STATES = ("PENDING", "RESCHEDULING")
WHERE = {"STRICT_PACK": "all on one node", "PACK": "on as few nodes as possible"}
# A replica's resources are taken before its process is there, and to be seen here; only after this long, in seconds, it is
# not its own process that it waits for.
PLACING_S = 10.0
# Of the resource by which Ray marks nodes with a kind of accelerator; it asks for as much itself.
ACCELERATOR_SHARE = 0.001


@dataclass(frozen=True, slots=True)
class Node:
    """What a living node has, and what of it is free."""

    total: Resources
    free: Resources


def placement_options(num_ranks: int, options: ReplicaOptions) -> dict[str, Any]:
    """What Serve's deployment takes of a replica's resources: of an actor, or of a group of ranks."""
    runtime_env = {} if options.runtime_env is None else {"runtime_env": options.runtime_env}
    actor = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus, **runtime_env}
    kind = options.accelerator_type
    if num_ranks == 1:
        own = {} if kind is None else {"accelerator_type": kind}
        most = options.max_replicas_per_node
        return {
            "ray_actor_options": {**actor, **own},
            **({} if most is None else {"max_replicas_per_node": most}),
        }
    return {
        "ray_actor_options": actor,
        "placement_group_bundles": group_bundles(num_ranks, options.num_cpus, options.num_gpus, kind),
        "placement_group_strategy": options.placement_group_strategy,
    }


def group_bundles(
    num_ranks: int, num_cpus: float, num_gpus: float, accelerator_type: str | None = None
) -> list[dict[str, float]]:
    """One bundle a rank. The replica, rank 0, is in the first one."""
    bundle = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount}
    if accelerator_type is not None:
        bundle[f"accelerator_type:{accelerator_type}"] = ACCELERATOR_SHARE
    return [dict(bundle) for _ in range(num_ranks)]


def why_not_placed(app_name: str, deployment_name: str) -> str | None:
    """What a replica without a place asks for, and what the nodes have; None if all replicas have a place.

    If several have none, the first one. Blocking: asks Ray's control store.
    """
    for group in ray.util.placement_group_table().values():
        if group["state"] in UNPLACED_STATES and _is_of(group["name"], app_name, deployment_name):
            is_hopeless = group["stats"]["scheduling_state"] == "INFEASIBLE"
            return explain(list(group["bundles"].values()), group["strategy"], _living_nodes(), is_hopeless=is_hopeless)
    for name, asked, pending_s in _pending_actors():
        if _is_of(name, app_name, deployment_name):
            return explain_replica(asked, _living_nodes(), is_new=pending_s < PLACING_S)
    return None


def explain_replica(asked: Resources, nodes: Sequence[Node], *, is_new: bool = False) -> str | None:
    """Why a single replica has no place; None when a node has room. is_new: it may be what has taken the room."""
    if any(_fits(asked, node.free) for node in nodes):
        return None
    is_hopeless = not any(_fits(asked, node.total) for node in nodes)
    if is_new and not is_hopeless:
        return None
    names = sorted(asked)
    return (
        f"an engine replica waits for {_amounts(asked, names)} on one node; {_room(names, nodes)}. "
        + ("No node has as much, even when idle" if is_hopeless else "It starts when that is free")
        + ": add nodes, or lower num_cpus or num_gpus"
    )


def explain(bundles: Sequence[Resources], strategy: str, nodes: Sequence[Node], *, is_hopeless: bool = False) -> str:
    """is_hopeless: not even with everything free. The bundles of a group are alike."""
    asked = bundles[0]
    names = sorted(asked)
    return (
        f"an engine replica waits for its tensor-parallel group to be placed: {len(bundles)} bundles of "
        f"{_amounts(asked, names)}, {WHERE.get(strategy, strategy)} ({strategy}); {_room(names, nodes)}. "
        + ("The cluster is too small even when idle" if is_hopeless else "It starts when that is free")
        + ": add nodes, or lower tensor_parallel_size, num_cpus or num_gpus"
    )


def _amounts(asked: Resources, names: Sequence[str]) -> str:
    return ", ".join(f"{asked[name]:g} {name}" for name in names)


def _room(names: Sequence[str], nodes: Sequence[Node]) -> str:
    """What of these resources the nodes have, the freest node first."""

    def describe(node: Node) -> str:
        return ", ".join(f"{node.free.get(name, 0):g} of {node.total.get(name, 0):g} {name}" for name in names)

    freest = sorted(nodes, key=lambda node: [node.free.get(name, 0) for name in reversed(names)], reverse=True)
    room = "; ".join(describe(node) for node in freest[:MAX_NODES_NAMED])
    more = f"; and {len(nodes) - MAX_NODES_NAMED} more nodes" if len(nodes) > MAX_NODES_NAMED else ""
    which = "node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    return f"free on the {which}: {room}{more}"


def _fits(asked: Resources, there: Resources) -> bool:
    return all(there.get(name, 0) >= amount for name, amount in asked.items())


def _is_of(name: str, app_name: str, deployment_name: str) -> bool:
    """Serve names a replica's placement group as it names the replica's actor."""
    if not ReplicaID.is_full_id_str(name):
        return False
    deployment = ReplicaID.from_full_id_str(name).deployment_id
    return (deployment.app_name, deployment.name) == (app_name, deployment_name)


def _pending_actors() -> Iterator[tuple[str, Resources, float]]:
    """Name, what it asks for, and since when it waits, in seconds; of each actor that is not created yet."""
    accessor = ray._private.state.state._connect_and_get_accessor()
    for row in accessor.get_actor_table(None, "PENDING_CREATION"):
        actor = ActorTableData.FromString(row)
        yield actor.name, dict(actor.required_resources), time.time() - actor.timestamp / 1000


def _living_nodes() -> list[Node]:
    free: dict[str, Any] = ray._private.state.available_resources_per_node()
    return [Node(node["Resources"], free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
