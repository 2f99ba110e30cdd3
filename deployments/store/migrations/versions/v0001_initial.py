"""Conversations, responses, items, transcripts. Written out, not taken from tables.py, which will have moved on."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("used_at", sa.Double, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.Column("next_position", sa.Integer, nullable=False),
        sa.Column("tip_response_id", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
    )
    op.create_index("ix_conversations_used_at", "conversations", ["used_at"])
    op.create_index("ix_conversations_tip_response_id", "conversations", ["tip_response_id"])

    op.create_table(
        "responses",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("conversation_id", sa.Text),
        sa.Column("conversation_start", sa.Integer),
        sa.Column("previous_response_id", sa.Text),
        sa.Column("session_key", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("completed_at", sa.Double),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("incomplete_reason", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("instructions", sa.Text),
        sa.Column("params", sa.Text, nullable=False),
        sa.Column("usage", sa.Text),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_responses"),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], name="fk_responses_conversation_id"),
        sa.ForeignKeyConstraint(["previous_response_id"], ["responses.id"], name="fk_responses_previous_response_id"),
    )
    op.create_index("ix_responses_conversation_id", "responses", ["conversation_id"])
    op.create_index("ix_responses_previous_response_id", "responses", ["previous_response_id"])
    op.create_index("ix_responses_created_at", "responses", ["created_at"])
    in_progress = sa.text("status = 'in_progress'")
    op.create_index(
        "ix_responses_in_progress",
        "responses",
        ["lease_until"],
        sqlite_where=in_progress,
        postgresql_where=in_progress,
    )
    op.create_index(
        "ix_responses_deleted",
        "responses",
        ["id"],
        sqlite_where=sa.text("deleted = 1"),
        postgresql_where=sa.text("deleted"),
    )

    op.create_table(
        "items",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("response_id", sa.Text),
        sa.Column("is_output", sa.Boolean, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("conversation_id", sa.Text),
        sa.Column("conversation_position", sa.Integer),
        sa.Column("role", sa.Text),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_items"),
        sa.ForeignKeyConstraint(["response_id"], ["responses.id"], name="fk_items_response_id"),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], name="fk_items_conversation_id"),
        sa.UniqueConstraint("response_id", "is_output", "position", name="uq_items_response_id_is_output_position"),
        sa.UniqueConstraint(
            "conversation_id", "conversation_position", name="uq_items_conversation_id_conversation_position"
        ),
    )

    op.create_table(
        "transcripts",
        sa.Column("response_id", sa.Text, nullable=False),
        sa.Column("parent_id", sa.Text),
        sa.Column("num_kept_tokens", sa.Integer, nullable=False),
        sa.Column("num_kept_chars", sa.Integer, nullable=False),
        sa.Column("num_kept_anchors", sa.Integer, nullable=False),
        sa.Column("token_ids", sa.LargeBinary, nullable=False),
        sa.Column("text", sa.LargeBinary, nullable=False),
        sa.Column("anchors", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("response_id", name="pk_transcripts"),
        sa.ForeignKeyConstraint(["response_id"], ["responses.id"], name="fk_transcripts_response_id"),
        sa.ForeignKeyConstraint(["parent_id"], ["transcripts.response_id"], name="fk_transcripts_parent_id"),
    )
    op.create_index("ix_transcripts_parent_id", "transcripts", ["parent_id"])


def downgrade() -> None:
    for table in ("transcripts", "items", "responses", "conversations"):
        op.drop_table(table)
