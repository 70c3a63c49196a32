"""Alembic's entry point: runs the steps on the connection that `migrate` hands over, in its transaction."""

from __future__ import annotations

from alembic import context

from control_service.adapters.sql.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
