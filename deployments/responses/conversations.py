"""/v1/conversations: lists of items to which turns are added. Nothing here asks an engine."""

from __future__ import annotations

from typing import Any

from deployments.http.admission import Admission
from deployments.responses.answers import deleted_conversation
from deployments.responses.api import ChooseId, choose_id
from deployments.responses.conversation_requests import ConversationBody, ConversationUpdateBody, ItemsBody, ListQuery
from deployments.responses.store_upkeep import StoreUpkeep
from deployments.responses.stored import conversation_of, list_of, new_items, num_bytes
from deployments.store.conversations import Conversations
from deployments.store.values import Page
from engine.tenant import Tenant


class ConversationsApi:
    """One per ingress process. Every method raises StoreError, and NotFoundError for an id that is not the tenant's."""

    def __init__(self, admission: Admission, upkeep: StoreUpkeep, choose_session_id: ChooseId) -> None:
        """choose_session_id: which of some ids a new session is to have."""
        self._admission = admission
        self._upkeep = upkeep
        self._choose_session_id = choose_session_id

    async def create(self, tenant: Tenant, body: ConversationBody) -> dict[str, Any]:
        """A new conversation. Raises TenantLimitError, StoredTooMuchError."""
        items = new_items(body.new_items(self._upkeep.store.new_id))
        self._admission.admit_storing(tenant.tenant_id, num_bytes(items, body.metadata))
        conversations = await self._opened()
        conversation_id = choose_id("conv", self._upkeep.store.new_id, self._choose_session_id)
        now = self._upkeep.clock()
        return conversation_of(await conversations.create(tenant.tenant_id, body.metadata, items, now, conversation_id))

    async def get(self, tenant: Tenant, conversation_id: str) -> dict[str, Any]:
        """The conversation without its items."""
        return conversation_of(await (await self._opened()).get(tenant.tenant_id, conversation_id))

    async def update(self, tenant: Tenant, conversation_id: str, body: ConversationUpdateBody) -> dict[str, Any]:
        """The conversation with other metadata. Raises TenantLimitError, StoredTooMuchError."""
        self._admission.admit_storing(tenant.tenant_id, num_bytes([], body.metadata))
        conversations = await self._opened()
        now = self._upkeep.clock()
        return conversation_of(await conversations.update(tenant.tenant_id, conversation_id, body.metadata, now))

    async def delete(self, tenant: Tenant, conversation_id: str) -> dict[str, Any]:
        """Deletes the conversation; its responses stay."""
        await (await self._opened()).delete(tenant.tenant_id, conversation_id)
        return deleted_conversation(conversation_id)

    async def list_items(self, tenant: Tenant, conversation_id: str, query: ListQuery) -> dict[str, Any]:
        """Part of its items."""
        conversations = await self._opened()
        return list_of(
            await conversations.list_items(tenant.tenant_id, conversation_id, query.after, query.limit, query.order)
        )

    async def add_items(self, tenant: Tenant, conversation_id: str, body: ItemsBody) -> dict[str, Any]:
        """The new items. Raises ConversationBusyError, TenantLimitError, StoredTooMuchError."""
        items = new_items(body.new_items(self._upkeep.store.new_id))
        self._admission.admit_storing(tenant.tenant_id, num_bytes(items))
        conversations = await self._opened()
        added = await conversations.add_items(tenant.tenant_id, conversation_id, items, self._upkeep.clock())
        return list_of(Page(added, has_more=False))

    async def get_item(self, tenant: Tenant, conversation_id: str, item_id: str) -> dict[str, Any]:
        """One item."""
        return dict((await (await self._opened()).get_item(tenant.tenant_id, conversation_id, item_id)).body)

    async def delete_item(self, tenant: Tenant, conversation_id: str, item_id: str) -> dict[str, Any]:
        """The conversation without the item. Raises ConversationBusyError."""
        conversations = await self._opened()
        now = self._upkeep.clock()
        return conversation_of(await conversations.delete_item(tenant.tenant_id, conversation_id, item_id, now))

    async def _opened(self) -> Conversations:
        return (await self._upkeep.opened()).conversations
