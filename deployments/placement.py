"""Room for tensor-parallel groups: the bundles of resources that a replica asks Ray for, and why it has not got them. Starts
nothing and reserves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.serve.request_router import ReplicaID

from engine.errors import EngineStoppedError

Resources = Mapping[str, float]

# Nodes that a message names, the freest first.
MAX_NODES_NAMED = 8
# Of a placement group for which Ray has still to find nodes, or has to again.
UNPLACED_STATES = ("PENDING", "RESCHEDULING")
WHERE = {"STRICT_PACK": "all on one node", "PACK": "on as few nodes as possible"}


class GroupNotPlacedError(EngineStoppedError):
    """No engine replica is ready, and one of them waits for nodes with room for its group of ranks."""

    code = "group_not_placed"


@dataclass(frozen=True, slots=True)
class Node:
    """What a living node has, and what of it nobody has taken."""

    total: Resources
    free: Resources


def group_bundles(num_ranks: int, num_cpus: float, num_gpus: float) -> list[dict[str, float]]:
    """One bundle a rank. The replica, rank 0, is in the first one."""
    bundle = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount}
    return [dict(bundle) for _ in range(num_ranks)]


def why_not_placed(app_name: str, deployment_name: str) -> str | None:
    """What the first of the deployment's groups that has no place asks for, and what the nodes have; None where all have one.
    Blocking: asks Ray's control store."""
    for group in ray.util.placement_group_table().values():
        if group["state"] in UNPLACED_STATES and _is_of(group["name"], app_name, deployment_name):
            is_hopeless = group["stats"]["scheduling_state"] == "INFEASIBLE"
            return explain(list(group["bundles"].values()), group["strategy"], _living_nodes(), is_hopeless=is_hopeless)
    return None


def explain(bundles: Sequence[Resources], strategy: str, nodes: Sequence[Node], *, is_hopeless: bool = False) -> str:
    """is_hopeless: not even with everything free. The bundles of a group are alike."""
    asked = bundles[0]
    names = sorted(asked)

    def describe(node: Node) -> str:
        return ", ".join(f"{node.free.get(name, 0):g} of {node.total.get(name, 0):g} {name}" for name in names)

    freest = sorted(nodes, key=lambda node: [node.free.get(name, 0) for name in reversed(names)], reverse=True)
    room = "; ".join(describe(node) for node in freest[:MAX_NODES_NAMED])
    more = f"; and {len(nodes) - MAX_NODES_NAMED} more nodes" if len(nodes) > MAX_NODES_NAMED else ""
    return (
        f"an engine replica waits for its tensor-parallel group to be placed: {len(bundles)} bundles of "
        f"{', '.join(f'{asked[name]:g} {name}' for name in names)}, {WHERE.get(strategy, strategy)} ({strategy}); "
        f"free on the {len(nodes)} nodes: {room}{more}. "
        + ("Not even all of it would do" if is_hopeless else "It starts when that is free")
        + ": add nodes, or lower tensor_parallel_size, num_cpus or num_gpus"
    )


def _is_of(group_name: str, app_name: str, deployment_name: str) -> bool:
    """Serve names a replica's group as it names the replica's actor."""
    if not ReplicaID.is_full_id_str(group_name):
        return False
    deployment = ReplicaID.from_full_id_str(group_name).deployment_id
    return (deployment.app_name, deployment.name) == (app_name, deployment_name)


def _living_nodes() -> list[Node]:
    free: dict[str, Any] = ray._private.state.available_resources_per_node()
    return [Node(node["Resources"], free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
