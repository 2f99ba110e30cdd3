"""How many replicas a deployment has now. What Serve tells a replica of its deployment's size is as of the replica's start:
scaling the deployment changes nothing in it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState

logger = logging.getLogger("ray.serve")

# Least time between two questions, in seconds.
PERIOD_S = 5.0


def count_replicas(app_name: str, deployment_name: str) -> int:
    """Those that run. Blocking: asks Serve's controller."""
    deployment = serve.status().applications[app_name].deployments[deployment_name]
    return deployment.replica_states.get(ReplicaState.RUNNING, 0)


class ReplicaCount:
    """Call it for the number of replicas as last heard, at least 1. Waits for nothing: news arrive beside the requests."""

    def __init__(self, count: Callable[[], int], initial: int) -> None:
        """count: see count_replicas; called in a thread. initial: until it has answered."""
        self._count = count
        self._num_replicas = initial
        self._asked_s = -PERIOD_S
        self._asking: asyncio.Task[None] | None = None

    def __call__(self) -> int:
        now = time.monotonic()
        if now - self._asked_s >= PERIOD_S and self._asking is None:
            self._asked_s = now
            self._asking = asyncio.create_task(self._ask())
        return self._num_replicas

    async def _ask(self) -> None:
        try:
            self._num_replicas = max(1, await asyncio.to_thread(self._count))
        # The controller starts anew, or the application is being deleted.
        except (RayError, RayServeException, KeyError) as error:
            logger.debug("the number of ingress replicas is not known: %r", error)
        finally:
            self._asking = None
