"""What is asked with every job that moves, and a page of a listing, is found by an index: in a history of ten thousand
jobs it costs what it costs in one of ten."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from control_service.adapters.sql.store import SqlStore
from control_service.app.store_ports import Transaction
from control_service.domain.job_state import ON_NODE, JobState

QUESTIONS: dict[str, Callable[[Transaction], Any]] = {
    "checkpoints that nobody needs": lambda tx: tx.checkpoints.list_unneeded(),
    "starts that nobody needs": lambda tx: tx.jobs.list_unneeded_starts(),
    "jobs on nodes": lambda tx: tx.jobs.in_states(ON_NODE),
    "whether content is used": lambda tx: tx.datasets.content_is_used("0" * 64),
    "live jobs of a dataset": lambda tx: tx.jobs.live_job_ids_of_dataset(1),
}
PAGES: dict[str, Callable[[Transaction], Any]] = {
    "of all jobs": lambda tx: tx.jobs.list_page(before_job_id="z", limit=50, project_id=0, states=()),
    "of a project": lambda tx: tx.jobs.list_page(before_job_id="z", limit=50, project_id=1, states=()),
    "of a state": lambda tx: tx.jobs.list_page(before_job_id="z", limit=50, project_id=0, states=(JobState.SUCCEEDED,)),
    "of the queue and what is on nodes": lambda tx: tx.jobs.list_page(
        before_job_id="z", limit=50, project_id=0, states=(JobState.QUEUED, *ON_NODE)
    ),
    "of two states": lambda tx: tx.jobs.list_page(
        before_job_id="z", limit=50, project_id=0, states=(JobState.SUCCEEDED, JobState.FAILED)
    ),
}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    opened = await SqlStore.open(tmp_path / "control.db")
    yield opened
    await opened.close()


async def _plans(store: SqlStore, ask: Callable[[Transaction], Any]) -> list[str]:
    """How the database goes about each statement of a question."""

    def work(tx: Transaction) -> list[str]:
        connection: Any = tx.jobs._connection  # type: ignore[attr-defined]
        driver = connection.connection.dbapi_connection
        texts: list[str] = []
        driver.set_trace_callback(texts.append)
        ask(tx)
        driver.set_trace_callback(None)
        # What the trace gives has the parameters in it.
        return [row[3] for text in texts for row in driver.execute(f"EXPLAIN QUERY PLAN {text}").fetchall()]

    return await store.read(work)


@pytest.mark.parametrize("question", QUESTIONS)
async def test_no_table_of_the_history_is_gone_through(store: SqlStore, question: str) -> None:
    plans = await _plans(store, QUESTIONS[question])
    assert any("SEARCH" in plan for plan in plans), plans
    tables = ("jobs", "events", "checkpoints", "artifacts", "blob_references")
    assert not [plan for plan in plans if plan.startswith(tuple(f"SCAN {table}" for table in tables))], plans
    if question == "checkpoints that nobody needs":
        assert any("checkpoints USING INDEX" in plan and "status" in plan for plan in plans), plans


@pytest.mark.parametrize("page", PAGES)
async def test_a_page_is_read_in_the_order_of_an_index(store: SqlStore, page: str) -> None:
    plans = await _plans(store, PAGES[page])
    assert any("USING INDEX" in plan for plan in plans), plans
    assert not [plan for plan in plans if "TEMP B-TREE" in plan], plans
