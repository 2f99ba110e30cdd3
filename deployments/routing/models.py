"""The models of an application: each has engine replicas of its own, and a request goes to those of the one that it names.

An adapter is a model, too, by its name: its requests go to the replicas of the model to which it is added.
"""

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
from deployments.http.served_model import check_model
from engine.adapters import split_session, with_adapter
from engine.cache_view import CacheQuery
from engine.core.retention import RetentionHint
from engine.errors import AdapterError, PensieveError, UnknownModelError
from engine.tenant import Tenant


class Engine(Protocol):
    """What the HTTP face needs of the engine replicas of one model; EngineClient has it."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]: ...

    async def describe(self) -> ModelCard: ...

    async def model_card(self) -> ModelCard: ...

    async def load(self) -> int: ...

    async def load_adapter(self, name: str, folder: str) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

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
        name = request.model
        engine, card = self._find(name), self._card_of(name)
        if card is not None and name in card.adapters:
            return engine.generate(replace(request, adapter=name))
        if card is not None and card.may_load_adapters:
            check_model(name or card.model_name, card)  # an adapter may have been unloaded since the gate looked
        return engine.generate(request)

    async def model_card(self, name: str = "") -> ModelCard:
        """What serves that model; of a single one, whatever it serves. Raises UnknownModelError, EngineStoppedError."""
        if not self._is_known(name):
            await self._ask_each()
        engine = self._find(name)
        card = await engine.model_card()
        if name not in ("", card.model_name, *card.adapters) and card.may_load_adapters:
            card = await engine.describe()  # it may have been loaded by way of another ingress replica
        self._note(engine, card)
        return card.of_adapter(name) if name in card.adapters else card

    async def model_cards(self) -> list[ModelCard]:
        """Of all models that are there, or were a while ago. Raises what the first one does if none is."""
        if len(self._engines) == 1:
            return _with_adapters([await self._first.model_card()])
        answers = await self._ask_each()
        if cards := [card for name in self._engines if (card := self._cards.get(name)) is not None]:
            return _with_adapters(cards)
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
        engine, card = self._find(model), self._card_of(model)
        if card is None or model not in card.adapters:
            return engine.choose_session_id(candidates)
        return split_session(engine.choose_session_id([with_adapter(each, model) for each in candidates]))[0]

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
        kept = []
        for name, each in self._engines.items():
            card = self._cards.get(name)
            for adapter in ("", *(card.adapters if card is not None else ())):
                key = with_adapter(session_id, adapter)
                kept.append(await each.keep(tenant, key, hint, even_unknown=even_unknown and not adapter))
        return next((each for each in kept if each is not None), None)

    async def load_adapter(self, name: str, folder: str, model: str = "") -> None:
        """Load an adapter to a model in all of its replicas; see EngineClient. Raises AdapterError, UnknownModelError.

        model: to which it belongs; empty = the first one.
        """
        engine = self._find(model)
        card = await engine.model_card()
        check_model(model or card.model_name, card)
        _check_may_load(card)
        if len(self._engines) > 1:
            await self._ask_each()  # another ingress replica may have loaded one of that name to another model
        others = [each for each in self._cards.values() if name in each.adapters]
        if others or name in self._engines or name in card.adapters:
            raise AdapterError(f"{name!r} is the name of a model, or of an adapter that is loaded", param="lora_name")
        await engine.load_adapter(name, folder)
        self._note(engine, await engine.model_card())

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter from all replicas of its model. Raises AdapterError."""
        if not self._is_known(name):
            await self._ask_each()
        engine = self._engine_with(name) or self._first
        _check_may_load(await engine.model_card())
        await engine.unload_adapter(name)
        self._note(engine, await engine.model_card())

    async def _ask_each(self) -> list[ModelCard | BaseException]:
        """In the order of the models. What is heard is kept: a model that is busy is not gone."""
        answers = await asyncio.gather(*(each.describe() for each in self._engines.values()), return_exceptions=True)
        for name, answer in zip(self._engines, answers, strict=True):
            if isinstance(answer, ModelCard):
                self._cards[name] = answer
            elif isinstance(answer, NoReplicaError):
                self._cards.pop(name, None)
        return answers

    def _is_known(self, name: str) -> bool:
        return len(self._engines) == 1 or name in ("", *self._engines) or self._engine_with(name) is not None

    def _engine_with(self, adapter: str) -> Engine | None:
        """The one that has that adapter, as far as was last heard."""
        return next((self._engines[name] for name, card in self._cards.items() if adapter in card.adapters), None)

    def _card_of(self, name: str) -> ModelCard | None:
        """Of the engine that serves that model or adapter, as far as was last heard."""
        return self._cards.get(self._name_of(self._find(name)))

    def _note(self, engine: Engine, card: ModelCard) -> None:
        self._cards[self._name_of(engine)] = card

    def _name_of(self, engine: Engine) -> str:
        return next(name for name, other in self._engines.items() if other is engine)

    def _find(self, name: str) -> Engine:
        if len(self._engines) == 1 or not name:
            return self._first
        if name in self._engines:
            return self._engines[name]
        if (engine := self._engine_with(name)) is None:
            known = ", ".join(map(repr, self._engines))
            raise UnknownModelError(
                f"the model {name[:MAX_NAME_CHARS]!r} is not served; use one of {known}", param="model"
            )
        return engine


def _with_adapters(cards: Sequence[ModelCard]) -> list[ModelCard]:
    """Each with those of its adapters behind it."""
    return [each for card in cards for each in (card, *map(card.of_adapter, card.adapters))]


def _check_may_load(card: ModelCard) -> None:
    if not card.may_load_adapters:
        raise AdapterError(
            f"adapters of {card.model_name!r} are not loaded while the server runs; set adapter_folder, under engine, to the "
            "folder of those that may be",
            param="adapter_folder",
        )
