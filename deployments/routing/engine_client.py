"""The ingress's side of the Serve handle to the engine replicas.

Routes by session, resumes what a lost replica began, turns everything that Ray and Serve may raise into ErrorItems, and
cancels what is read no more. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.cluster.adapters import AdapterRecords
from deployments.cluster.refreshed import Refreshed
from deployments.engine_log import keep_request_id, named
from deployments.errors import NoReplicaError
from deployments.generation import (
    CacheHold,
    DeltaItem,
    ErrorItem,
    GenerationItem,
    GenerationRequest,
    KeptConversation,
    ModelCard,
    ReplicaCache,
    drain,
)
from deployments.routing.journey import Journey
from deployments.routing.load import ReplicaLoad, SessionSizes, pass_over
from deployments.routing.presence import DESCRIBE_TIMEOUT_S, Presence
from deployments.routing.rendezvous import choose_session_id, rank_replicas, routing_name
from deployments.routing.replica_failures import REPLICA_LOST, as_engine_error
from deployments.routing.resumption import Progress, Retries
from engine.cache_view import CacheQuery
from engine.core.retention import RetentionHint
from engine.errors import AdapterError, EngineError, EngineStoppedError, OverloadedError
from engine.generation import conversation_name
from engine.tenant import Tenant

logger = logging.getLogger("ray.serve")

# Least time between two questions about the loads of all replicas, in seconds; asked only when requests come.
LOADS_PERIOD_S = 0.5
# How long the replicas may take to load an adapter, in seconds. They try again later.
LOAD_TIMEOUT_S = 60.0


class EngineClient:
    """Engine replicas behind one handle."""

    def __init__(
        self,
        handle: DeploymentHandle,
        num_fallback_replicas: int = 1,
        why_absent: Callable[[], NoReplicaError] = lambda: NoReplicaError("no engine replica is ready"),
        engine_wait_s: float = 0.0,
    ) -> None:
        """Asks nothing yet.

        num_fallback_replicas: how many replicas besides its home may be asked for a request.
        why_absent: why there is no replica; may block.
        engine_wait_s: how long a request waits for a replica while there is none, in seconds.
        """
        self._handle = handle
        self._num_fallback_replicas = num_fallback_replicas
        self._presence = Presence(handle, why_absent, engine_wait_s)
        self._loads: Refreshed[dict[int, ReplicaLoad]] = Refreshed(
            self._ask_loads, {}, LOADS_PERIOD_S, (TimeoutError, *REPLICA_LOST)
        )
        self._sizes = SessionSizes()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        """The items of the answer. Never raises on account of Ray.

        If the session's home is full, its next choice is asked; if all are, that is an ErrorItem. If the queue of its home is
        so long that another choice answers sooner, although the session's KV is not there, that is asked first. If a
        replica is lost, another one goes on from the last token that came, as soon as it has room. When there is no
        replica, waits for one, and an ErrorItem says why none came. Closing or cancelling this generator aborts the
        request in the engine.
        """
        if request.sampling.seed is None and not request.sampling.is_greedy:
            # Drawn here, so that a second replica samples what the first one would have.
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(62)))
        progress, retries = Progress(request), Retries(self._num_fallback_replicas)
        journey = Journey(request, time.monotonic(), time.time())
        num_passed = self._num_passed_over(request.routing_key)
        while True:
            journey.ask(time.monotonic())
            with _Call(self._handle, progress.rest_of_request(), num_passed, self._presence) as call:
                while isinstance(item := await call.next(), DeltaItem):
                    retries.note_delta()
                    is_home = None if item.delta.explanation is None else self._is_home(request.routing_key, item)
                    item = journey.note(item, is_home, time.monotonic())
                    if item.delta.finish_reason is not None:
                        num_tokens = item.delta.num_prompt_tokens + item.delta.num_output_tokens
                        self._sizes.note(request.routing_key, num_tokens, item.replica_rank)
                    yield progress.note(item)
            if item is None or progress.is_finished:
                return
            if num_passed > retries.num_refusals and item.is_a(OverloadedError):
                num_passed = retries.num_refusals  # it is full as well: home, as if it had not been asked
                continue
            pause_s = retries.pause_s(item, time.monotonic())
            if pause_s is None:
                yield item
                return
            num_passed = retries.num_refusals
            if retries.is_lost:
                journey.lose(item, len(progress.token_ids), time.monotonic())
            await asyncio.sleep(pause_s)
            if retries.is_lost:
                logger.warning(
                    "request %s goes on at output token %d elsewhere (%s)",
                    *(request.request_id, len(progress.token_ids), item.kind),
                    extra=named(request.origin.request_id),
                )
                try:
                    await self._presence.wait()
                except NoReplicaError as error:
                    yield ErrorItem.of(error)
                    return

    async def describe(self) -> ModelCard:
        """See Presence.describe."""
        return await self._presence.describe()

    async def model_card(self) -> ModelCard:
        """See Presence.model_card."""
        return await self._presence.model_card()

    async def load_adapter(self, name: str, folder: str) -> None:
        """In all replicas, also in those that start later; in none if one of them cannot, or the caller leaves before.

        Raises AdapterError, or EngineError if a replica does not say whether it can.
        """
        records = self._adapter_records()
        if not await asyncio.to_thread(records.add, name, folder):
            raise AdapterError(f"an adapter {name!r} is loaded already; unload it first", param="lora_name")
        try:
            for problems in await self._adjust_adapters():
                if name in problems:
                    raise AdapterError(problems[name], param="lora_path")
        except BaseException:
            await asyncio.to_thread(records.remove, name)
            with suppress(EngineError):  # which do not answer now hear of it when they are asked what they serve
                await self._adjust_adapters()
            raise

    async def unload_adapter(self, name: str) -> None:
        """In all replicas; requests that have it go on. Raises AdapterError, or EngineError if a replica does not answer."""
        if not await asyncio.to_thread(self._adapter_records().remove, name):
            raise AdapterError(
                f"no adapter {name!r} was loaded by this endpoint; those of the configuration stay", param="lora_name"
            )
        await self._adjust_adapters()

    async def _adjust_adapters(self) -> list[dict[str, str]]:
        """Of each replica, why which adapters could not be loaded. Raises EngineError if one does not say so.

        One that is lost in the meantime counts as none: what replaces it loads what it finds noted.
        """
        try:
            answers: list[Any] = await self._handle.broadcast("adjust_adapters").results_async(
                timeout_s=LOAD_TIMEOUT_S, return_exceptions=True
            )
        except TimeoutError:
            raise EngineStoppedError(
                f"not every engine replica has loaded its adapters within {LOAD_TIMEOUT_S:g} seconds; try again later"
            ) from None
        except REPLICA_LOST as error:
            raise as_engine_error(error, "adapters") from error
        await self._presence.look_again()
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, REPLICA_LOST):
                raise as_engine_error(answer, "adapters") from answer
        return [answer for answer in answers if isinstance(answer, dict)]

    def _adapter_records(self) -> AdapterRecords:
        return AdapterRecords(self._handle.app_name, self._handle.deployment_name)

    def choose_session_id(self, candidates: Sequence[str]) -> str:
        """For a session that begins: of these ids, the one whose home is the least loaded as far as is known here.

        Waits for nothing: news of the loads arrive concurrently with the requests.
        """
        loads = self._loads()
        chosen = choose_session_id(candidates, {rank: load.num_requests for rank, load in loads.items()})
        ranks = sorted(loads)
        if ranks:  # until the next news, it is where we sent it
            load = loads[rank := ranks[rank_replicas(chosen, ranks)[0]]]
            loads[rank] = replace(load, num_requests=load.num_requests + 1)
        return chosen

    def _num_passed_over(self, session_id: str) -> int:
        """How many of the session's choices its next request does not go to, as far as the loads are known here.

        Waits for nothing: news of them arrive concurrently with the requests.
        """
        loads = self._loads()
        ranks = sorted(loads)
        if not ranks:
            return 0
        order = [ranks[index] for index in rank_replicas(session_id, ranks)]
        return pass_over(session_id, order, loads, self._num_fallback_replicas, self._sizes)

    def _is_home(self, session_id: str, item: DeltaItem) -> bool | None:
        """Whether the session belongs to the replica that said this; None if the replicas are not known yet."""
        ranks = sorted(self._loads())
        return ranks[rank_replicas(session_id, ranks)[0]] == item.replica_rank if ranks else None

    async def _ask_loads(self) -> dict[int, ReplicaLoad]:
        answers: list[Any] = await self._handle.broadcast("get_load").results_async(
            timeout_s=DESCRIBE_TIMEOUT_S, return_exceptions=True
        )
        return dict(answer for answer in answers if isinstance(answer, tuple))

    async def load(self) -> int:
        """How many requests run or wait in all replicas. Raises EngineStoppedError if none says so."""
        answers = [answer for answer in await self._ask_all("get_load") if isinstance(answer, tuple)]
        if not answers:
            raise EngineStoppedError(f"no engine replica answered within {DESCRIBE_TIMEOUT_S:g} seconds")
        return sum(load.num_requests for _, load in answers)

    async def map_cache(self, query: CacheQuery) -> list[ReplicaCache]:
        """What is where in the replicas that answer, in the order of their ranks. None may be there."""
        answers = await self._ask_all("map_cache", query)
        maps = [answer for answer in answers if isinstance(answer, ReplicaCache)]
        return sorted(maps, key=lambda answer: answer.replica_rank)

    async def hold_back(self, hold: CacheHold) -> list[int]:
        """Makes the tiers of all replicas smaller, or gives back what was taken; the ranks of those that did it."""
        return sorted(answer for answer in await self._ask_all("hold_back", hold) if isinstance(answer, int))

    async def keep(
        self, tenant: Tenant, session_id: str, hint: RetentionHint | None, *, even_unknown: bool = False
    ) -> KeptConversation | None:
        """See LLMServer.keep, of the replica that answered the session last as far as is known here, else of its home.

        Raises EngineStoppedError, or what became of the replica.
        """
        ranks = sorted(self._loads())
        order = [ranks[index] for index in rank_replicas(session_id, ranks)][: 1 + self._num_fallback_replicas]
        _, last_rank = self._sizes.find(session_id)
        num_passed = order.index(last_rank) if last_rank in order else 0
        handle = self._handle.options(session_id=routing_name(session_id, num_passed))
        conversation_id = conversation_name(tenant, session_id)
        try:
            response = handle.keep.remote(conversation_id, hint, even_unknown=even_unknown)
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                kept: KeptConversation | None = await response
        except TimeoutError:
            raise EngineStoppedError(
                f"the engine replica did not answer within {DESCRIBE_TIMEOUT_S:g} seconds"
            ) from None
        except Exception as error:
            raise as_engine_error(error, f"about {session_id}") from error
        return kept

    async def _ask_all(self, method: str, *arguments: CacheQuery | CacheHold) -> list[Any]:
        """What each replica answers, or raises."""
        try:
            answers: list[Any] = await self._handle.broadcast(method, *arguments).results_async(
                timeout_s=DESCRIBE_TIMEOUT_S, return_exceptions=True
            )
            return answers
        except (TimeoutError, *REPLICA_LOST) as error:
            logger.debug("no engine replica answers %s: %r", method, error)
            return []


class _Call:
    """One call of one replica. What Ray raises is its last item; leaving the block before its end cancels it."""

    def __init__(
        self, handle: DeploymentHandle, request: GenerationRequest, num_refusals: int, presence: Presence
    ) -> None:
        """num_refusals: how many of the session's choices are passed over."""
        self._request_id, self._log_id = request.request_id, request.origin.request_id
        self._presence = presence
        name = routing_name(request.routing_key, num_refusals)
        keep_request_id(self._log_id)
        self._responses = handle.options(stream=True, session_id=name).generate.remote(request)
        self._items = aiter(self._responses)
        self._is_first = True
        self._is_over = False

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *_: object) -> None:
        # Without this Serve lets a request run on in some configurations (calls by value), and always if no item was being
        # waited for when the client left.
        if not self._is_over:
            self._responses.cancel()

    async def next(self) -> GenerationItem | None:
        """The next item; None after the last one."""
        try:
            item = await (self._presence.first_of(self._items) if self._is_first else anext(self._items))
            self._is_first = False
            if isinstance(item, ErrorItem):  # the last one
                await drain(self._items)
                self._is_over = True
            return item
        except StopAsyncIteration:
            self._is_over = True
            return None
        except NoReplicaError as error:
            return ErrorItem.of(error)
        except Exception as error:
            self._is_over = True
            return ErrorItem.of(as_engine_error(error, self._request_id, self._log_id))
