"""What Ray and Serve raise when a call of an engine replica fails, as errors for clients."""

from __future__ import annotations

import logging

from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.engine_log import named
from deployments.errors import InternalError, ReplicaLostError
from engine.errors import EngineError, OverloadedError

logger = logging.getLogger("ray.serve")

REPLICA_LOST = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,  # a large item went with its node
    OutOfMemoryError,  # Ray killed the replica before the system would
    WorkerCrashedError,
    DeploymentUnavailableError,
)


def as_engine_error(error: Exception, request_id: str, log_id: str = "") -> EngineError:
    """What the failure means for the request; what clients are not told is logged.

    log_id: its X-Request-Id.
    """
    if isinstance(error, BackPressureError):
        return OverloadedError("the queue is full; try again later", retry_after_s=error.retry_after_s)
    if isinstance(error, REPLICA_LOST):
        logger.warning("request %s lost its engine replica: %s", request_id, type(error).__name__, extra=named(log_id))
        return ReplicaLostError("the engine replica that served this request was lost; send it again")
    logger.error("request %s failed", request_id, exc_info=error, extra=named(log_id))
    return InternalError(f"internal error while serving {request_id}")
