"""Between the JSON objects of the API and the values of the store. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.responses.answers import ResponseJson, cancelled, conversation_object, interrupted, list_object
from deployments.responses.items import ItemJson
from deployments.store.values import INTERRUPTED, NewItem, Page, Status, StoredConversation, StoredResponse


def response_of(stored: StoredResponse) -> ResponseJson:
    """A stored response as its client saw it."""
    base: ResponseJson = dict(stored.params) | {"instructions": stored.instructions}
    if stored.status is Status.IN_PROGRESS:
        return base
    if stored.status is Status.CANCELLED:
        return cancelled(base)
    if stored.status is Status.FAILED:
        return base | {"status": "failed", "error": stored.error}
    if stored.incomplete_reason == INTERRUPTED:
        return interrupted(base)
    details = None if stored.incomplete_reason is None else {"reason": stored.incomplete_reason}
    output = [item.body for item in stored.output]
    return base | {
        "status": stored.status.value,
        "output": output,
        "usage": stored.usage,
        "incomplete_details": details,
    }


def conversation_of(stored: StoredConversation) -> dict[str, Any]:
    """A stored conversation as its client sees it."""
    return conversation_object(stored.id, int(stored.created_at), stored.metadata)


def list_of(page: Page) -> dict[str, Any]:
    """A page of stored items as its client sees it."""
    return list_object([dict(item.body) for item in page.items], has_more=page.has_more)


def new_items(items: Sequence[ItemJson]) -> list[NewItem]:
    """Items as the store takes them. Each has an id that the store has given."""
    return [NewItem(item.get("role"), item, item["id"]) for item in items]


def num_bytes(items: Sequence[NewItem], metadata: Mapping[str, str] | None = None) -> int:
    """The size as JSON, which is how they are stored."""
    return len(json.dumps([metadata, *(dict(item.body) for item in items)]))
