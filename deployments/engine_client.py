"""The ingress's side of the Serve handle to the engine replicas: routes by session, turns everything that Ray
and Serve may raise into ErrorItems, and cancels what nobody reads any more. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest, ModelCard
from deployments.placement import GroupNotPlacedError
from deployments.rendezvous import choose_session_id, rank_replicas, routing_name
from engine.errors import EngineStoppedError, OverloadedError
from engine.prompt import AnswerBeginning

logger = logging.getLogger("ray.serve")

REPLICA_LOST = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,  # a large item went with its node
    OutOfMemoryError,  # Ray killed the replica before the system would
    WorkerCrashedError,
    DeploymentUnavailableError,
)
# What ends an attempt but not the request: the replica is gone, or on its way out.
RESUMABLE = ("replica_lost", EngineStoppedError.code)
# Replicas in a row that a request may lose without getting a token: it may be what kills them.
MAX_LOSSES_IN_A_ROW = 5
# The pauses between them are 0, 1, 3, 7 and 15 times this, in seconds.
RESUME_BACKOFF_S = 0.5
# How long a request whose replica was lost goes on asking replicas that are full, in seconds: they are full of others that
# were lost with it.
RESUME_PATIENCE_S = 60.0
# Least time between two questions about the loads of all replicas, in seconds; asked only where sessions begin.
LOADS_PERIOD_S = 0.5
# How long an engine replica may take to say that it is alive, in seconds.
DESCRIBE_TIMEOUT_S = 5.0


class _Progress:
    """What of an answer has come, so that another replica can go on from there."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self.token_ids: list[int] = []
        self._history = request.history
        self.is_finished = False
        self._num_chars = 0
        self._num_attempts = 0

    def note(self, item: DeltaItem) -> DeltaItem:
        """Take in an item on its way to the client, and make it what the client expects next."""
        if item.delta.prompt_transcript is not None:
            self._history = item.delta.prompt_transcript
            item = replace(item, delta=replace(item.delta, prompt_transcript=None))
        if self.token_ids and item.delta.prompt_token_ids:  # they came with the first one
            item = replace(item, delta=replace(item.delta, prompt_token_ids=()))
        self.token_ids += item.delta.token_ids
        self._num_chars += len(item.delta.text)
        self.is_finished = item.delta.finish_reason is not None
        return item

    def rest_of_request(self) -> GenerationRequest:
        self._num_attempts += 1
        if self._num_attempts == 1:
            return self._request
        # Another id: the first replica may be alive and not know yet that nobody listens.
        request_id = f"{self._request.request_id}-{self._num_attempts}"
        beginning = AnswerBeginning(tuple(self.token_ids), self._num_chars) if self.token_ids else None
        return replace(self._request, request_id=request_id, history=self._history, beginning=beginning)


class EngineClient:
    """Engine replicas behind one handle. num_fallback_replicas: how many besides its home may be asked for a request."""

    def __init__(
        self,
        handle: DeploymentHandle,
        num_fallback_replicas: int = 1,
        why_not_placed: Callable[[], str | None] = lambda: None,
    ) -> None:
        """why_not_placed: what a replica waits for, where none is there; may block."""
        self._handle = handle
        self._num_fallback_replicas = num_fallback_replicas
        self._why_not_placed = why_not_placed
        self._why_logged = ""
        self._card: ModelCard | None = None
        self._loads: dict[int, int] = {}
        self._loads_s = -LOADS_PERIOD_S
        self._asking: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        """The items of the answer. Never raises on account of Ray: where the home is full the session's next choice is asked,
        where all are that is an ErrorItem, and where the replica is lost another one goes on from the last token that came,
        as soon as it has room. Closing or cancelling this generator aborts the request in the engine."""
        if request.sampling.seed is None and not request.sampling.is_greedy:
            # Drawn here, so that a second replica samples what the first one would have.
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(62)))
        progress = _Progress(request)
        num_losses = num_refusals = 0
        patient_until_s = 0.0
        while True:
            loss: ErrorItem | None = None
            is_refused = is_patient = False
            async with aclosing(self._attempt(progress.rest_of_request(), num_refusals)) as items:
                async for item in items:
                    if isinstance(item, ErrorItem) and item.code in RESUMABLE:
                        loss = item
                        break
                    if isinstance(item, ErrorItem) and item.code == OverloadedError.code:
                        is_refused = num_refusals < self._num_fallback_replicas
                        is_patient = time.monotonic() < patient_until_s
                        if is_refused or is_patient:
                            break
                    if isinstance(item, DeltaItem):
                        num_losses = 0
                        item = progress.note(item)
                    yield item
            if is_refused:
                num_refusals += 1
                continue
            if is_patient:
                num_refusals = 0  # the home first again
                await asyncio.sleep(2 * RESUME_BACKOFF_S)
                continue
            if loss is None or progress.is_finished:
                return
            num_losses += 1
            patient_until_s = time.monotonic() + RESUME_PATIENCE_S
            if num_losses > MAX_LOSSES_IN_A_ROW:
                yield loss
                return
            logger.warning(
                "request %s goes on at output token %d elsewhere (%s)",
                request.request_id,
                len(progress.token_ids),
                loss.code,
            )
            # Routers and health checks need a moment to see what is dead.
            await asyncio.sleep(RESUME_BACKOFF_S * (2 ** (num_losses - 1) - 1))

    async def _attempt(self, request: GenerationRequest, num_refusals: int) -> AsyncGenerator[GenerationItem, None]:
        handle = self._handle.options(stream=True, session_id=routing_name(request.session_id, num_refusals))
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

    def choose_session_id(self, candidates: Sequence[str]) -> str:
        """For a session that begins: of these ids, the one whose home is the least loaded as far as is known here. Waits for
        nothing: news of the loads arrive beside the requests."""
        now = time.monotonic()
        if now - self._loads_s >= LOADS_PERIOD_S and self._asking is None:
            self._loads_s = now
            self._asking = asyncio.create_task(self._ask_loads())
        chosen = choose_session_id(candidates, self._loads)
        ranks = sorted(self._loads)
        if ranks:  # until the next news, it is where we sent it
            self._loads[ranks[rank_replicas(chosen, ranks)[0]]] += 1
        return chosen

    async def _ask_loads(self) -> None:
        try:
            answers: list[Any] = await self._handle.broadcast("get_load").results_async(
                timeout_s=DESCRIBE_TIMEOUT_S, return_exceptions=True
            )
            self._loads = dict(answer for answer in answers if isinstance(answer, tuple))
        except (TimeoutError, *REPLICA_LOST) as error:
            logger.debug("the loads of the engine replicas are not known: %r", error)
        finally:
            self._asking = None

    async def describe(self) -> ModelCard:
        """Ask the engine replicas; the first good answer. Raises EngineStoppedError where none of them gives
        one in time, GroupNotPlacedError where one has no room to start in.

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
        if why := await asyncio.to_thread(self._why_not_placed):
            if why != self._why_logged:  # whoever waits for us asks every few seconds
                self._why_logged = why
                logger.warning(why)
            raise GroupNotPlacedError(why)
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
