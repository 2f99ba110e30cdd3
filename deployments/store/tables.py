"""The tables of the conversation store, the same in SQLite and PostgreSQL.

Owns names, keys and indexes; a change here needs a migration (`deployments/store/migrations/versions`), and a test
compares the two.

    conversations <- items -> responses <- transcripts          tenant_usage, write_probe
          ^---------------------'

An item can be in a response (input or output), in a conversation, or in both: a turn of a conversation adds its items
to it, and taking one out of the conversation leaves the response as it was.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator

from deployments.store.errors import StoreCorruptedError

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)


class JsonText(TypeDecorator[Any]):
    """JSON in a text column, in ASCII.

    PostgreSQL's own JSON and text types reject characters that clients and models do send (NUL, lone surrogates), and
    nothing is ever looked up inside.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Raises StoreCorruptedError."""
        try:
            return None if value is None else json.loads(value)
        except ValueError:
            raise StoreCorruptedError from None  # without what it quotes


conversations = Table(
    "conversations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("used_at", Double, nullable=False),  # the latest turn or change; what retention goes by
    Column("metadata", JsonText, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("next_position", Integer, nullable=False),
    # The latest response with a transcript. No foreign key: responses point here already. Null once deleted.
    Column("tip_response_id", Text),
    Index("ix_conversations_used_at", "used_at"),
    Index("ix_conversations_tip_response_id", "tip_response_id"),
)

responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("conversation_id", Text, ForeignKey("conversations.id")),
    # The history begins with the conversation's items below this position. Inherited by responses that continue this one
    # outside the conversation, whose session_key names it. Null where there is none, and until the turn is complete.
    Column("conversation_start", Integer),
    Column("previous_response_id", Text, ForeignKey("responses.id")),
    Column("session_key", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("completed_at", Double),
    Column("status", Text, nullable=False),
    Column("incomplete_reason", Text),
    Column("error", JsonText),
    Column("instructions", JsonText),
    Column("params", JsonText, nullable=False),
    Column("usage", JsonText),
    Column("owner", Text, nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Index("ix_responses_conversation_id", "conversation_id"),
    Index("ix_responses_previous_response_id", "previous_response_id"),
    Index("ix_responses_created_at", "created_at"),
    Index(
        "ix_responses_in_progress",
        "lease_until",
        sqlite_where=text("status = 'in_progress'"),
        postgresql_where=text("status = 'in_progress'"),
    ),
    Index("ix_responses_deleted", "id", sqlite_where=text("deleted = 1"), postgresql_where=text("deleted")),
)

items = Table(
    "items",
    metadata,
    Column("id", Text, primary_key=True),
    Column("response_id", Text, ForeignKey("responses.id")),
    Column("is_output", Boolean, nullable=False),
    Column("position", Integer, nullable=False),  # within the input or the output of the response
    Column("conversation_id", Text, ForeignKey("conversations.id")),
    Column("conversation_position", Integer),
    Column("role", Text),
    Column("body", JsonText, nullable=False),
    UniqueConstraint("response_id", "is_output", "position"),
    UniqueConstraint("conversation_id", "conversation_position"),
)

# What the engine computed up to the end of a response, as the difference to parent_id's: see transcript_delta.
transcripts = Table(
    "transcripts",
    metadata,
    Column("response_id", Text, ForeignKey("responses.id"), primary_key=True),
    Column("parent_id", Text, ForeignKey("transcripts.response_id")),
    Column("num_kept_tokens", Integer, nullable=False),
    Column("num_kept_chars", Integer, nullable=False),
    Column("num_kept_anchors", Integer, nullable=False),
    Column("token_ids", LargeBinary, nullable=False),
    Column("text", LargeBinary, nullable=False),
    Column("anchors", LargeBinary, nullable=False),
    # Of the tokenizer and the chat template that made the ids; empty = not known, and the ids are not used.
    Column("fingerprint", Text, nullable=False, server_default=""),
    # Where the last answer begins; null = not known, and the answer is recognised only by its very text.
    Column("answer_start_tokens", Integer),
    Column("answer_start_chars", Integer),
    Index("ix_transcripts_parent_id", "parent_id"),
)

# What each tenant keeps, as store/usage counts it; changed in the transactions that change what is counted.
tenant_usage = Table(
    "tenant_usage",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("num_rows", BigInteger, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
)

# One row, changed in order to find out if the store can be written.
write_probe = Table(
    "write_probe",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("num_writes", BigInteger, nullable=False),
)
