"""The control plane's benchmark with much history: databases filled through the product's own schema, and what
start-up, reads and memory come to."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.control_plane_world import World, child, resident_bytes
from control_service.adapters.clock import system_ids
from control_service.adapters.sql import schema
from control_service.adapters.sql.engine import connect, make_engine
from control_service.adapters.sql.records import job_from_row, job_to_row
from control_service.adapters.sql.store import DATABASE_NAME
from control_service.domain.job_state import JobState
from control_service.domain.run import RunState
from tests.fakes.control import Client

_LOAD = "benchmarks.control_plane_load"
_PAYLOAD = b"\x32\x50" + b"\x08\x01" * 40


async def scale(directory: Path, *, sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """For each (jobs, events): seconds to serve, rates of reads, memory."""
    found = {}
    for num_jobs, num_events in sizes:
        at = World(directory / f"{num_jobs}-{num_events}", module="control_service", flags=())
        await at.start_control()
        await at.fill()
        at.job_id = await _start_job(at)
        await at.control.end()
        started = time.perf_counter()
        newest = await asyncio.to_thread(_fill, at, num_jobs, num_events)
        fill_seconds = time.perf_counter() - started
        (at.directory / "ready.json").unlink(missing_ok=True)
        started = time.perf_counter()
        await at.start_control()
        start_seconds = time.perf_counter() - started
        try:
            result: dict[str, Any] = {"start_seconds": start_seconds, "fill_seconds": fill_seconds}
            at.job_id = newest
            for name in ("GetJob", "ListJobs"):
                call = at.call(name, 2.0)
                async with child(_LOAD, json.dumps({"kind": "calls", "calls": [call]})) as load:
                    result[f"{name}_per_second"] = (await load.line())[0]["per_second"]
            watch = {"kind": "watch", "address": at.address, "job_id": newest, "num_watchers": 16}
            until = num_events // num_jobs + 1
            async with child(_LOAD, json.dumps({**watch, "until_sequence": until})) as load:
                result["history_deliveries_per_second"] = 16 * until / (await load.line())["seconds"]
            result["resident_bytes"] = resident_bytes(at.control.process.pid)
        finally:
            await at.end()
        found[f"{num_jobs} jobs, {num_events} events"] = result
    return found


async def _start_job(at: World) -> str:
    client = Client(at.address)
    try:
        return str((await client.start_training(at.project_id)).job_id)
    finally:
        await client.close()


def _fill(at: World, num_jobs: int, num_events: int) -> str:
    """Copies of the job that is there, over, each with its part of the events; the newest one's id."""
    engine = make_engine(at.directory / "control" / DATABASE_NAME)
    connection = connect(engine, read_only=False)
    row = connection.execute(sa.select(schema.jobs)).mappings().one()
    template = job_from_row({**row})
    ids = system_ids(newest=template.job_id)
    over = replace(template, state=JobState.SUCCEEDED, run_state=RunState.SUCCEEDED, end_time=template.create_time)
    per_job = num_events // num_jobs
    insert = (
        "INSERT INTO events (job_id, sequence, attempt, run_sequence, kind, time, payload) "
        "WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
        "SELECT ?, i, 1, i - 1, 6, 1700000000000000 + i, ? FROM n"
    )
    job_id = template.job_id
    connection.exec_driver_sql("PRAGMA synchronous = OFF")
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    for _ in range(num_jobs):
        job_id = ids.new_id()
        job = replace(over, job_id=job_id, output_path=f"output/{job_id}")
        connection.execute(sa.insert(schema.jobs).values(**job_to_row(job), last_sequence=per_job + 1))
        state = {"job_id": job_id, "sequence": 1, "attempt": 0, "kind": 1, "time": job.create_time, "payload": b""}
        connection.execute(sa.insert(schema.events).values(**state))
        connection.exec_driver_sql(insert, (per_job + 1, job_id, _PAYLOAD))
    connection.exec_driver_sql("COMMIT")
    connection.close()
    engine.dispose()
    return job_id
