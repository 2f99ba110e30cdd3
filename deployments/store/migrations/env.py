"""Runs migrations on the connection that `deployments.store.database` hands over, in its transaction.

There is no ini file and no offline mode.
"""

from alembic import context

from deployments.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
