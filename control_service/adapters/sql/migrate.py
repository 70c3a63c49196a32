"""Brings a database to the newest schema, in one transaction. Refuses a database that a newer version made."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from control_service.domain.errors import FailedPrecondition

_SCRIPTS = Path(__file__).parent / "migrations"


def migrate(connection: sa.Connection, *, revision: str = "head") -> None:
    """Runs the missing steps up to a revision inside the caller's transaction."""
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    found = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise FailedPrecondition(
            "STORE_UNAVAILABLE", f"the database has schema {found}, which a newer version of this service made"
        )
    command.upgrade(config, revision)
