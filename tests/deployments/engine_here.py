"""An engine replica without Serve, with the face of EngineClient: for applications in the test's own process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

from deployments import llm_server
from deployments.generation import CacheHold, KeptConversation, ModelCard, ReplicaCache
from deployments.llm_server import LLMServer
from engine.cache_view import CacheQuery
from engine.config import EngineConfig
from engine.core.retention import RetentionHint
from engine.generation import conversation_name
from engine.tenant import Tenant


class EngineHere(LLMServer):
    """The only replica. num_looks: how often its cache was looked at."""

    num_looks = 0

    def __init__(self, config: EngineConfig, stream_interval_s: float, drain_s: float = 0.0) -> None:
        # The engine's log stays where it is: it would be moved for the whole process, and with it for all later tests.
        with mock.patch.object(llm_server, "log_engine_with_serve"):
            super().__init__(replace(config, kv_handover="off"), stream_interval_s, drain_s=drain_s)

    def replica_rank(self) -> int:
        return 0

    async def get_statistics(self) -> dict[str, Any]:
        return {"replica_rank": 0, **self._engine.get_statistics()}

    async def model_card(self) -> ModelCard:
        return await self.describe()

    async def load(self) -> int:
        return (await self.get_load())[1].num_requests

    def choose_session_id(self, candidates: Sequence[str]) -> str:
        return candidates[0]

    async def map_cache(self, query: CacheQuery) -> list[ReplicaCache]:  # type: ignore[override]
        self.num_looks += 1
        return [await super().map_cache(query)]

    async def keep(  # type: ignore[override]
        self, tenant: Tenant, session_id: str, hint: RetentionHint | None, *, even_unknown: bool = False
    ) -> KeptConversation | None:
        return await super().keep(conversation_name(tenant, session_id), hint, even_unknown=even_unknown)

    async def hold_back(self, hold: CacheHold) -> list[int]:  # type: ignore[override]
        return [await super().hold_back(hold)]
