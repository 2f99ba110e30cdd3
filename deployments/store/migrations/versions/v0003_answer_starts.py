"""Where the last answer of a transcript begins, so that it is recognised in the template's words, too."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("transcripts", sa.Column("answer_start_tokens", sa.Integer))
    op.add_column("transcripts", sa.Column("answer_start_chars", sa.Integer))


def downgrade() -> None:
    op.drop_column("transcripts", "answer_start_chars")
    op.drop_column("transcripts", "answer_start_tokens")
