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
from control_service.adapters.sql.records import checkpoint_to_row, job_from_row, job_to_row
from control_service.adapters.sql.store import DATABASE_NAME
from control_service.domain.artifact import Checkpoint, CheckpointStatus
from control_service.domain.job import Job
from control_service.domain.job_state import JobState
from control_service.domain.run import RunState
from tests.fakes.control import Client
from tunesmith.control.v1 import job_service_pb2

_LOAD = "benchmarks.control_plane_load"
_NUM_MOVED = 50
_FEW_WATCHERS, _MANY_WATCHERS = 16, 2000
_CHECKPOINTS_A_JOB = 3
_JOBS_A_COMMIT = 500
_PAYLOAD = b"\x32\x50" + b"\x08\x01" * 40


async def scale(directory: Path, *, sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """For each (jobs, events): seconds to serve, rates of reads, what jobs that come and go cost, memory. A size of
    (0, 0) is the service with nothing but the job that the others are copies of."""
    found = {}
    for num_jobs, num_events in sizes:
        at = World(directory / f"{num_jobs}-{num_events}", module="control_service", flags=())
        await at.start_control()
        await at.fill()
        at.job_id = await _start_job(at)
        await at.control.end()
        started = time.perf_counter()
        newest = await asyncio.to_thread(_fill, at, num_jobs, num_events) if num_jobs else at.job_id
        fill_seconds = time.perf_counter() - started
        (at.directory / "ready.json").unlink(missing_ok=True)
        started = time.perf_counter()
        await at.start_control()
        result: dict[str, Any] = {
            "start_seconds": time.perf_counter() - started,
            "start_cpu_seconds": at.control.cpu_seconds(),
            "fill_seconds": fill_seconds,
            "database_bytes": (at.directory / "control" / DATABASE_NAME).stat().st_size,
        }
        try:
            await _measure(at, newest, result, num_in_log=num_events // num_jobs + 1 if num_jobs else 0)
        finally:
            await at.end()
        found[f"{num_jobs} jobs, {num_events} events"] = result
    return found


async def queue(directory: Path, *, counts: tuple[int, ...]) -> dict[str, Any]:
    """For each number of jobs that wait: seconds to serve, what looking at one costs, and what one that comes and goes
    does."""
    found = {}
    for num_jobs in counts:
        at = World(directory / f"{num_jobs}", module="control_service", flags=())
        await at.start_control()
        await at.fill()
        at.job_id = await _start_job(at)
        await at.control.end()
        await asyncio.to_thread(_fill_queue, at, num_jobs)
        (at.directory / "ready.json").unlink(missing_ok=True)
        started = time.perf_counter()
        await at.start_control()
        result: dict[str, Any] = {"start_seconds": time.perf_counter() - started}
        try:
            # The first one to ask has the queue read.
            await _start_and_cancel(at, 1)
            await _call(at, "GetJob", at.job_id, result)
            await _call(at, "ListJobs", at.job_id, result)
            result["start_and_cancel_cpu_ms"] = await _start_and_cancel(at)
            result["resident_bytes"] = resident_bytes(at.control.process.pid)
        finally:
            await at.end()
        found[f"{num_jobs} waiting"] = result
    return found


async def _call(at: World, name: str, job_id: str, result: dict[str, Any]) -> None:
    """Rate and processor time of one kind of call."""
    call = {**at.call(name, 2.0), "job_id": job_id}
    before = at.control.cpu_seconds()
    async with child(_LOAD, json.dumps({"kind": "calls", "calls": [call]})) as load:
        calls = (await load.line())[0]
    result[f"{name}_per_second"] = calls["per_second"]
    result[f"{name}_cpu_us"] = (at.control.cpu_seconds() - before) / calls["calls"] * 1e6


async def _measure(at: World, job_id: str, result: dict[str, Any], *, num_in_log: int) -> None:
    for name in ("GetJob", "ListJobs", "CreateProject"):
        await _call(at, name, job_id, result)
    result["start_and_cancel_cpu_ms"] = await _start_and_cancel(at)
    result["resident_bytes"] = resident_bytes(at.control.process.pid)
    for num_watchers in (_FEW_WATCHERS, _MANY_WATCHERS) if num_in_log else ():
        watch = {"kind": "watch", "address": at.address, "job_id": job_id, "num_watchers": num_watchers}
        async with child(_LOAD, json.dumps({**watch, "until_sequence": num_in_log})) as load:
            seconds = (await load.line())["seconds"]
        result[f"history_deliveries_per_second, {num_watchers} watchers"] = num_watchers * num_in_log / seconds
        result[f"resident_bytes, {num_watchers} watchers"] = resident_bytes(at.control.process.pid)


async def _start_and_cancel(at: World, num_moved: int = _NUM_MOVED) -> float:
    """Milliseconds of control's processor time for a job that is queued and cancelled, with all that its moves wake."""
    client = Client(at.address)
    try:
        before = at.control.cpu_seconds()
        for _ in range(num_moved):
            job = await client.start_training(at.project_id)
            await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job.job_id), timeout=60.0)
        return (at.control.cpu_seconds() - before) / num_moved * 1e3
    finally:
        await client.close()


async def _start_job(at: World) -> str:
    client = Client(at.address)
    try:
        return str((await client.start_training(at.project_id)).job_id)
    finally:
        await client.close()


def _fill_queue(at: World, num_jobs: int) -> None:
    """Copies of the job that waits."""
    engine = make_engine(at.directory / "control" / DATABASE_NAME)
    connection = connect(engine, read_only=False)
    row = connection.execute(sa.select(schema.jobs)).mappings().one()
    template = job_from_row({**row})
    ids = system_ids(newest=template.job_id)
    jobs = [replace(template, job_id=ids.new_id()) for _ in range(num_jobs)]
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    connection.execute(sa.insert(schema.jobs), [{**job_to_row(job), "last_sequence": 1} for job in jobs])
    connection.exec_driver_sql("COMMIT")
    connection.close()
    engine.dispose()


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
    for number in range(num_jobs):
        if number % _JOBS_A_COMMIT == 0:
            if number:
                connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        job_id = ids.new_id()
        job = replace(over, job_id=job_id, output_path=f"output/{job_id}")
        connection.execute(sa.insert(schema.jobs).values(**job_to_row(job), last_sequence=per_job + 1))
        state = {"job_id": job_id, "sequence": 1, "attempt": 0, "kind": 1, "time": job.create_time, "payload": b""}
        connection.execute(sa.insert(schema.events).values(**state))
        connection.exec_driver_sql(insert, (per_job + 1, job_id, _PAYLOAD))
        connection.execute(sa.insert(schema.checkpoints), [_deleted(job, n) for n in range(_CHECKPOINTS_A_JOB)])
        held = {"job_id": job_id, "holder": "artifact:adapter"}
        connection.execute(
            sa.insert(schema.blob_references), [{**held, "sha256": f"{number:062x}{n:02x}"} for n in range(4)]
        )
    connection.exec_driver_sql("COMMIT")
    connection.close()
    engine.dispose()
    return job_id


def _deleted(job: Job, number: int) -> dict[str, Any]:
    """A checkpoint of a job that is over."""
    checkpoint = Checkpoint(
        job_id=job.job_id,
        name=f"step-{number:08d}",
        attempt=1,
        step=number,
        status=CheckpointStatus.DELETED,
        size_bytes=1024,
        manifest_sha256="0" * 64,
        files=(),
        node="bench",
        create_time=job.create_time,
    )
    return checkpoint_to_row(checkpoint)
