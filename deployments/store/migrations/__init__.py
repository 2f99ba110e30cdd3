"""Alembic's environment and the revisions of the conversation store's schema."""
