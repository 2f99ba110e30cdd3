"""The bodies of the Conversations API, and the query strings of both APIs. See requests.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from deployments.http.generation_body import SessionKey
from deployments.http.parsing import Body, Query
from deployments.responses.input_items import FewItems, SomeFewItems, new_items, text_or
from deployments.responses.items import ItemJson, NewId
from deployments.responses.labels import METADATA_SCHEMA, Include, Metadata

# May be said any number of times, and nothing of it is here: see labels.INCLUDABLE.
INCLUDE = ("include", "include[]")


class ConversationBody(Body):
    """POST /v1/conversations."""

    items: Annotated[FewItems, text_or(FewItems)] = Field(default_factory=list)
    metadata: Metadata = Field(default_factory=dict)

    def new_items(self, new_id: NewId) -> tuple[ItemJson, ...]:
        """The items, each with an id of its own."""
        return new_items(self.items, new_id)


class ConversationUpdateBody(Body):
    """POST /v1/conversations/{id}: these pairs in place of the old ones. null clears them; absent is a mistake."""

    metadata: Annotated[Metadata, WithJsonSchema({"anyOf": [METADATA_SCHEMA, {"type": "null"}]})]

    @model_validator(mode="before")
    @classmethod
    def _null_clears(cls, data: Any) -> Any:
        if isinstance(data, dict) and "metadata" in data and data["metadata"] is None:
            return data | {"metadata": {}}
        return data


class ItemsBody(Body):
    """POST /v1/conversations/{id}/items."""

    items: Annotated[SomeFewItems, text_or(SomeFewItems)]
    include: Include = Field(default_factory=list)

    def new_items(self, new_id: NewId) -> tuple[ItemJson, ...]:
        """The items, each with an id of its own."""
        return new_items(self.items, new_id)


class ListQuery(Query):
    """Which part of a list: up to limit items after that one, in the order of time or against it."""

    ignored = frozenset(INCLUDE)

    after: SessionKey | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"


class RetrieveQuery(Query):
    """GET /v1/responses/{id}."""

    ignored = frozenset({*INCLUDE, "include_obfuscation"})

    stream: bool = False
    starting_after: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _check_is_streamed(self) -> Self:
        if self.starting_after is not None and not self.stream:
            raise PydanticCustomError("invalid", "only allowed when stream is true", {"param": "starting_after"})
        return self
