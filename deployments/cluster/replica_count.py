"""How many replicas a deployment has now.

What Serve tells a replica of its deployment's size is as of the replica's start; scaling does not change it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState

from deployments.cluster.refreshed import Refreshed

# Least time between two questions, in seconds.
PERIOD_S = 5.0
# The controller starts anew, or the application is being deleted.
FAILURES = (RayError, RayServeException, KeyError)


def replica_count(app_name: str, deployment_name: str, initial: int) -> Callable[[], int]:
    """Call what this returns for the number of running replicas as last heard, at least 1.

    initial: the number until Serve has answered.
    """

    async def ask() -> int:
        return max(1, await asyncio.to_thread(count_replicas, app_name, deployment_name))

    return Refreshed(ask, initial, PERIOD_S, FAILURES)


def count_replicas(app_name: str, deployment_name: str) -> int:
    """The replicas that run. Blocking: asks Serve's controller. Raises what FAILURES lists."""
    deployment = serve.status().applications[app_name].deployments[deployment_name]
    return int(deployment.replica_states.get(ReplicaState.RUNNING, 0))
