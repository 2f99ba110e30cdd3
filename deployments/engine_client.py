"""The ingress's side of the Serve handle to the engine replicas: routes by session, turns everything that Ray
and Serve may raise into ErrorItems, and cancels what nobody reads any more. Knows no HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import NodeDiedError, OwnerDiedError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.generation import ErrorItem, GenerationItem, GenerationRequest, ModelCard
from engine.errors import EngineStoppedError

logger = logging.getLogger("ray.serve")

REPLICA_LOST = (RayActorError, NodeDiedError, OwnerDiedError, WorkerCrashedError, DeploymentUnavailableError)
# How long an engine replica may take to say that it is alive, in seconds.
DESCRIBE_TIMEOUT_S = 5.0


class EngineClient:
    """Engine replicas behind one handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._card: ModelCard | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        """The items of the answer. Never raises on account of Ray: a lost replica or a full queue is an
        ErrorItem. Closing or cancelling this generator aborts the request in the engine."""
        handle = self._handle.options(stream=True, session_id=request.session_id)
        responses = handle.generate.remote(request)
        ended = False
        try:
            async for item in responses:
                yield item
            ended = True
        except Exception as error:
            ended = True
            yield _error_item(error, request.request_id)
        finally:
            # On CancelledError and GeneratorExit. Without this word Serve lets a request run on in some
            # configurations (calls by value), and always where nobody was iterating when the client left.
            if not ended:
                responses.cancel()

    async def describe(self) -> ModelCard:
        """Ask the engine replicas; the first good answer. Raises EngineStoppedError where none of them gives
        one in time.

        A broadcast, because a call that is routed waits behind the requests: busy is not dead.
        """
        try:
            answers: list[Any] = await self._handle.broadcast("describe").results_async(
                timeout_s=DESCRIBE_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, *REPLICA_LOST):
            answers = []
        for answer in answers:
            if isinstance(answer, ModelCard):
                self._card = answer
                return answer
        raise EngineStoppedError("no engine replica is ready; try again in a moment")

    async def model_card(self) -> ModelCard:
        """What is served; asked once, for it does not change while this process lives. Raises EngineStoppedError."""
        return self._card if self._card is not None else await self.describe()


def _error_item(error: Exception, request_id: str) -> ErrorItem:
    if isinstance(error, BackPressureError):
        message = "the server is at its limit of waiting requests; try again later"
        return ErrorItem(429, message, "rate_limit_error", "overloaded", retry_after_s=error.retry_after_s or 1.0)
    if isinstance(error, REPLICA_LOST):
        logger.warning("request %s lost its engine replica: %s", request_id, type(error).__name__)
        message = "the engine replica that served this request was lost; send it again"
        return ErrorItem(503, message, "service_unavailable", "replica_lost", retry_after_s=1.0)
    logger.error("request %s failed", request_id, exc_info=error)
    return ErrorItem(500, f"internal error while serving {request_id}", "server_error")
