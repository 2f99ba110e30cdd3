"""The ingress's side of the Serve handle to the engine replicas: routes by session, turns everything that Ray
and Serve may raise into ErrorItems, and cancels what nobody reads any more. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.errors import InternalError, NoReplicaError, ReplicaLostError
from deployments.generation import (
    CacheHold,
    DeltaItem,
    ErrorItem,
    GenerationItem,
    GenerationRequest,
    ModelCard,
    ReplicaCache,
)
from deployments.routing.rendezvous import choose_session_id, rank_replicas, routing_name
from engine.cache_view import CacheQuery
from engine.errors import EngineStoppedError, OverloadedError
from engine.text.prompt import AnswerBeginning

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
RESUMABLE = frozenset({ReplicaLostError.__name__, EngineStoppedError.__name__})
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
# For so long all who want to know share one look at the replicas, in seconds; and so long a request waits for its first
# item before it asks whether there are any.
LOOK_PERIOD_S = 1.0
# How old may be what is known of the model, in seconds: a deploy may change it under a living ingress.
CARD_PERIOD_S = 10.0


class _Progress:
    """What of an answer has come, so that another replica can go on from there."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self.token_ids: list[int] = []
        self._history = request.history
        self._model = ""
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
        self._model = item.model
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
        begun_by = self._model if self.token_ids else ""
        return replace(
            self._request, request_id=request_id, history=self._history, beginning=beginning, begun_by=begun_by
        )


class EngineClient:
    """Engine replicas behind one handle. num_fallback_replicas: how many besides its home may be asked for a request. While
    there is none, requests wait for one, `engine_wait_s` seconds at most."""

    def __init__(
        self,
        handle: DeploymentHandle,
        num_fallback_replicas: int = 1,
        why_absent: Callable[[], NoReplicaError] = lambda: NoReplicaError("no engine replica is ready"),
        engine_wait_s: float = 0.0,
    ) -> None:
        """why_absent: why there is no replica; may block."""
        self._handle = handle
        self._num_fallback_replicas = num_fallback_replicas
        self._why_absent = why_absent
        self._why_logged = ""
        self._engine_wait_s = engine_wait_s
        self._card: ModelCard | None = None
        self._card_s = 0.0
        self._look: asyncio.Task[NoReplicaError | None] | None = None
        self._looked_s = 0.0
        self._absent_since_s: float | None = None  # as of the last look
        self._loads: dict[int, int] = {}
        self._loads_s = -LOADS_PERIOD_S
        self._asking: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        """The items of the answer. Never raises on account of Ray: where the home is full the session's next choice is asked,
        where all are that is an ErrorItem, and where the replica is lost another one goes on from the last token that came,
        as soon as it has room. When there is no replica, it waits for one, and an ErrorItem says why none came. Closing or
        cancelling this generator aborts the request in the engine."""
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
                    if isinstance(item, ErrorItem) and item.kind in RESUMABLE:
                        loss = item
                        break
                    if isinstance(item, ErrorItem) and item.is_a(OverloadedError):
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
                loss.kind,
            )
            # Routers and health checks need a moment to see what is dead.
            await asyncio.sleep(RESUME_BACKOFF_S * (2 ** (num_losses - 1) - 1))
            try:
                await self._wait_for_replica()
            except NoReplicaError as error:
                yield ErrorItem.of(error)
                return

    async def _attempt(self, request: GenerationRequest, num_refusals: int) -> AsyncGenerator[GenerationItem, None]:
        handle = self._handle.options(stream=True, session_id=routing_name(request.session_id, num_refusals))
        responses = handle.generate.remote(request)
        items = aiter(responses)
        ended = False
        try:
            yield await self._first_of(items)
            async for item in items:
                yield item
            ended = True
        except NoReplicaError as error:
            yield ErrorItem.of(error)
        except StopAsyncIteration:  # there was no first one
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

    async def map_cache(self, query: CacheQuery) -> list[ReplicaCache]:
        """What is where in the replicas that answer, in the order of their ranks. None may be there."""
        answers = await self._ask_all("map_cache", query)
        maps = [answer for answer in answers if isinstance(answer, ReplicaCache)]
        return sorted(maps, key=lambda answer: answer.replica_rank)

    async def hold_back(self, hold: CacheHold) -> list[int]:
        """Makes the tiers of all replicas smaller, or gives back what was taken; the ranks of those that did it."""
        return sorted(answer for answer in await self._ask_all("hold_back", hold) if isinstance(answer, int))

    async def _ask_all(self, method: str, argument: CacheQuery | CacheHold) -> list[Any]:
        """What each replica answers, or raises."""
        try:
            return await self._handle.broadcast(method, argument).results_async(
                timeout_s=DESCRIBE_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, *REPLICA_LOST) as error:
            logger.debug("no engine replica answers %s: %r", method, error)
            return []

    async def describe(self) -> ModelCard:
        """What the engine replicas say of themselves; the first good answer, at most a second old. Raises NoReplicaError when
        there is none, and EngineStoppedError when none answers in time."""
        error = await self._look_for_replicas()
        if error is not None:
            raise error
        if self._card is None or self._card_s < self._looked_s:
            raise EngineStoppedError(f"no engine replica answered within {DESCRIBE_TIMEOUT_S:g} seconds")
        return self._card

    async def model_card(self) -> ModelCard:
        """What is served, as far as it is known here; for the first time, waits for a replica that says it. Raises
        EngineStoppedError."""
        if self._card is None:
            await self._wait_for_replica()
            return self._card or await self.describe()
        if time.monotonic() - self._card_s >= CARD_PERIOD_S:
            self._start_look()
        return self._card

    async def _wait_for_replica(self) -> None:
        """Until there is one. Raises NoReplicaError when that takes too long, or is not to be expected."""
        start_s = time.monotonic()
        while (error := await self._look_for_replicas()) is not None:
            self._give_up(error, start_s)
            await asyncio.sleep(LOOK_PERIOD_S)

    async def _first_of(self, items: AsyncIterator[GenerationItem]) -> GenerationItem:
        """The first item. While it does not come, looks whether there is a replica that it could come from: a router without
        replicas waits for ever. Raises as _wait_for_replica does."""
        start_s = time.monotonic()
        first = asyncio.ensure_future(anext(items))
        first.add_done_callback(lambda task: task.cancelled() or task.exception())  # so that it counts as seen
        try:
            while not (await asyncio.wait([first], timeout=LOOK_PERIOD_S))[0]:
                if (error := await self._look_for_replicas()) is not None and not first.done():
                    self._give_up(error, start_s)
            return first.result()
        finally:
            first.cancel()

    def _give_up(self, error: NoReplicaError, start_s: float) -> None:
        """Raises `error` when a request that waits since `start_s` is to wait no longer."""
        since_s = max(start_s, self._absent_since_s or start_s)
        if error.is_final or time.monotonic() - since_s >= self._engine_wait_s:
            raise error

    async def _look_for_replicas(self) -> NoReplicaError | None:
        """Why no engine replica is there; None when one is. All who ask within LOOK_PERIOD_S share the answer."""
        return await asyncio.shield(self._start_look())

    def _start_look(self) -> asyncio.Task[NoReplicaError | None]:
        """The look that is under way or fresh, else a new one."""
        if self._look is None or (self._look.done() and time.monotonic() - self._looked_s >= LOOK_PERIOD_S):
            self._look = asyncio.create_task(self._ask_replicas())
        return self._look

    async def _ask_replicas(self) -> NoReplicaError | None:
        """A broadcast, because a call that is routed waits behind the requests: busy is not dead."""
        start_s = time.monotonic()
        is_busy = False
        try:
            answers: list[Any] = await self._handle.broadcast("describe").results_async(
                timeout_s=DESCRIBE_TIMEOUT_S, return_exceptions=True
            )
        except TimeoutError:
            answers, is_busy = [], True
        except REPLICA_LOST:
            answers = []
        now = time.monotonic()
        self._looked_s = start_s
        card = next((answer for answer in answers if isinstance(answer, ModelCard)), None)
        if card is not None:
            self._card, self._card_s = card, now
        if card is not None or is_busy:
            self._absent_since_s = None
            self._why_logged = ""
            return None
        if self._absent_since_s is None:
            self._absent_since_s = start_s
        error = await asyncio.to_thread(self._why_absent)
        if str(error) != self._why_logged:  # who waits for us asks every few seconds
            self._why_logged = str(error)
            logger.warning("%s", error)
        return error


def _error_item(error: Exception, request_id: str) -> ErrorItem:
    if isinstance(error, BackPressureError):
        message = "the server is at its limit of waiting requests; try again later"
        return ErrorItem.of(OverloadedError(message, retry_after_s=error.retry_after_s))
    if isinstance(error, REPLICA_LOST):
        logger.warning("request %s lost its engine replica: %s", request_id, type(error).__name__)
        message = "the engine replica that served this request was lost; send it again"
        return ErrorItem.of(ReplicaLostError(message))
    logger.error("request %s failed", request_id, exc_info=error)
    return ErrorItem.of(InternalError(f"internal error while serving {request_id}"))
