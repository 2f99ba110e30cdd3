"""Which tokenizer made a transcript's ids; how much each tenant keeps; a row that shows that the store can be written."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# As deployments/store/usage.py counts: for each row 512 bytes, and the lengths of its long columns.
COUNT = """
INSERT INTO tenant_usage (tenant, num_rows, num_bytes)
SELECT tenant, SUM(num_rows), SUM(num_bytes) FROM (
    SELECT tenant, COUNT(*) AS num_rows, SUM(512 + LENGTH(metadata)) AS num_bytes
    FROM conversations GROUP BY tenant
    UNION ALL
    SELECT tenant, COUNT(*), SUM(512 + LENGTH(params) + COALESCE(LENGTH(instructions), 0))
    FROM responses GROUP BY tenant
    UNION ALL
    SELECT responses.tenant, COUNT(*), SUM(512 + LENGTH(token_ids) + LENGTH(text) + LENGTH(anchors))
    FROM transcripts JOIN responses ON responses.id = transcripts.response_id GROUP BY responses.tenant
    UNION ALL
    SELECT COALESCE(responses.tenant, conversations.tenant), COUNT(*), SUM(512 + LENGTH(body))
    FROM items
    LEFT JOIN responses ON responses.id = items.response_id
    LEFT JOIN conversations ON conversations.id = items.conversation_id
    GROUP BY COALESCE(responses.tenant, conversations.tenant)
) AS counted
WHERE tenant IS NOT NULL GROUP BY tenant
"""


def upgrade() -> None:
    # Older ids came from a tokenizer that is not known: they are not used, and the text is tokenised again.
    op.add_column("transcripts", sa.Column("fingerprint", sa.Text, nullable=False, server_default=""))

    op.create_table(
        "tenant_usage",
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("num_rows", sa.BigInteger, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant", name="pk_tenant_usage"),
    )
    op.execute(COUNT)

    op.create_table(
        "write_probe",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("num_writes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_write_probe"),
    )
    op.execute("INSERT INTO write_probe (id, num_writes) VALUES (1, 0)")


def downgrade() -> None:
    op.drop_table("write_probe")
    op.drop_table("tenant_usage")
    op.drop_column("transcripts", "fingerprint")
