"""The models of an application: each has engine replicas of its own, and a request goes to those of the one that it names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from deployments.errors import NoReplicaError
from deployments.generation import (
    CacheHold,
    GenerationItem,
    GenerationRequest,
    KeptConversation,
    ModelCard,
    ReplicaCache,
)
from deployments.http.parsing import MAX_NAME_CHARS
from engine.cache_view import CacheQuery
from engine.core.retention import RetentionHint
from engine.errors import PensieveError, UnknownModelError
from engine.tenant import Tenant


class Engine(Protocol):
    """What the HTTP face needs of the engine replicas of one model; EngineClient has it."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]: ...

    async def describe(self) -> ModelCard: ...

    async def model_card(self) -> ModelCard: ...

    async def load(self) -> int: ...

    def choose_session_id(self, candidates: Sequence[str]) -> str: ...

    async def map_cache(self, query: CacheQuery) -> list[ReplicaCache]: ...

    async def hold_back(self, hold: CacheHold) -> list[int]: ...

    async def keep(
        self, tenant: Tenant, session_id: str, hint: RetentionHint | None, *, even_unknown: bool = False
    ) -> KeptConversation | None: ...


class Models:
    """All engines of an application, by what clients call their models."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        """A single one may have any name: it says itself what it serves. The first one is meant if a request names none."""
        self._engines = dict(engines)
        self._first = next(iter(self._engines.values()))
        self._cards: dict[str, ModelCard] = {}

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        """See EngineClient.generate. Raises UnknownModelError."""
        return self._find(request.model).generate(request)

    async def model_card(self, name: str = "") -> ModelCard:
        """What serves that model; of a single one, whatever it serves. Raises UnknownModelError, EngineStoppedError."""
        return await self._find(name).model_card()

    async def model_cards(self) -> list[ModelCard]:
        """Of all models that are there, or were a while ago. Raises what the first one does if none is."""
        if len(self._engines) == 1:
            return [await self._first.model_card()]
        answers = await self._ask_each()
        if cards := [card for name in self._engines if (card := self._cards.get(name)) is not None]:
            return cards
        raise next(answer for answer in answers if isinstance(answer, PensieveError))

    async def describe(self) -> ModelCard:
        """The first model's card, with the warnings of all. Raises EngineStoppedError if one of them is not there."""
        if len(self._engines) == 1:
            return await self._first.describe()
        answers = await self._ask_each()
        for name, answer in zip(self._engines, answers, strict=True):
            if isinstance(answer, PensieveError):
                raise type(answer)(f"{name}: {answer.message}") from answer
        cards = [answer for answer in answers if isinstance(answer, ModelCard)]
        warnings = [f"{card.model_name}: {warning}" for card in cards for warning in card.warnings]
        return replace(cards[0], warnings=tuple(warnings))

    async def load(self) -> int:
        """How many requests run or wait in all of them. Raises EngineStoppedError if no model says so."""
        answers = await asyncio.gather(*(each.load() for each in self._engines.values()), return_exceptions=True)
        loads = [answer for answer in answers if isinstance(answer, int)]
        if not loads:
            raise next(answer for answer in answers if isinstance(answer, BaseException))
        return sum(loads)

    def choose_session_id(self, candidates: Sequence[str], model: str = "") -> str:
        """See EngineClient.choose_session_id. Raises UnknownModelError."""
        return self._find(model).choose_session_id(candidates)

    async def map_cache(self, query: CacheQuery) -> list[ReplicaCache]:
        """Of all replicas, which are numbered through from one model to the next."""
        maps: list[ReplicaCache] = []
        for each in self._engines.values():
            first = len(maps) and maps[-1].replica_rank + 1
            maps += [
                replace(cache, replica_rank=first + cache.replica_rank) if first else cache
                for cache in await each.map_cache(query)
            ]
        return maps

    async def hold_back(self, hold: CacheHold) -> list[int]:
        """In all replicas; their numbers, as in map_cache."""
        ranks: list[int] = []
        for each in self._engines.values():
            first = len(ranks) and ranks[-1] + 1
            ranks += [first + rank for rank in await each.hold_back(hold)]
        return ranks

    async def keep(
        self, tenant: Tenant, session_id: str, hint: RetentionHint | None, *, even_unknown: bool = False
    ) -> KeptConversation | None:
        """See EngineClient.keep: of the first model that knows the conversation; a hint goes to all that do."""
        kept = [await each.keep(tenant, session_id, hint, even_unknown=even_unknown) for each in self._engines.values()]
        return next((each for each in kept if each is not None), None)

    async def _ask_each(self) -> list[ModelCard | BaseException]:
        """In the order of the models. What is heard is kept: a model that is busy is not gone."""
        answers = await asyncio.gather(*(each.describe() for each in self._engines.values()), return_exceptions=True)
        for name, answer in zip(self._engines, answers, strict=True):
            if isinstance(answer, ModelCard):
                self._cards[name] = answer
            elif isinstance(answer, NoReplicaError):
                self._cards.pop(name, None)
        return answers

    def _find(self, name: str) -> Engine:
        if len(self._engines) == 1 or not name:
            return self._first
        if name not in self._engines:
            known = ", ".join(map(repr, self._engines))
            raise UnknownModelError(
                f"the model {name[:MAX_NAME_CHARS]!r} is not served; use one of {known}", param="model"
            )
        return self._engines[name]
