"""The real database beside the store in memory: does every transaction too, and must come to the same records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from control_service.adapters.sql.engine import connect, make_engine
from control_service.adapters.sql.migrate import migrate
from control_service.adapters.sql.touched import Touched
from control_service.adapters.sql.transaction import SqlTransaction
from control_service.domain.dataset import DatasetDraft
from control_service.domain.errors import TunesmithError
from control_service.domain.job_state import JobState
from tests.faults.simulation.invariants import hold
from tests.faults.simulation.memory_store import Tables


class SqlShadow:
    """Empty but for the project and the dataset of the tables."""

    def __init__(self, database: Path, tables: Tables) -> None:
        self._connection = connect(make_engine(database), read_only=False)
        self._connection.exec_driver_sql("BEGIN IMMEDIATE")
        migrate(self._connection)
        tx = SqlTransaction(self._connection, Touched())
        for dataset in tables.datasets.values():
            draft = DatasetDraft(**{name: getattr(dataset, name) for name in DatasetDraft.__dataclass_fields__})
            tx.datasets.insert(name=dataset.name, draft=draft, now=dataset.create_time)
        for project in tables.projects.values():
            tx.projects.insert(draft=project.draft, now=project.create_time)
        self._connection.exec_driver_sql("COMMIT")

    def repeat(self, work: Callable[[Any], Any]) -> str:
        """Does the work; the reason of its refusal, empty if there was none."""
        self._connection.exec_driver_sql("BEGIN IMMEDIATE")
        refused = ""
        try:
            work(SqlTransaction(self._connection, Touched()))
        except TunesmithError as error:
            refused = error.reason
        self._connection.exec_driver_sql("ROLLBACK" if refused else "COMMIT")
        return refused

    def compare(self, tables: Tables) -> None:
        """Raises Broken where the records differ."""
        tx = SqlTransaction(self._connection, Touched())
        stored = {job.job_id: job for job in tx.jobs.in_states(set(JobState))}
        hold(stored == tables.jobs, "the database's jobs differ")
        for job_id, log in tables.events.items():
            hold(list(tx.events.page(job_id, after_sequence=0, limit=100_000)) == log, f"the log of {job_id} differs")
            kept = [c for (owner, _), c in tables.checkpoints.items() if owner == job_id]
            kept.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.name))
            hold(list(tx.checkpoints.list_for_job(job_id)) == kept, f"the checkpoints of {job_id} differ")
        hold(list(tx.nodes.list_all()) == [node for _, node in sorted(tables.nodes.items())], "the nodes differ")

    def close(self) -> None:
        """Gives the file back."""
        self._connection.close()
