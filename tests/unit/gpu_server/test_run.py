"""A run as the server reads it: batches, wake-ups, and what counts as a change."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from gpu_service.domain.run_state import RunState
from gpu_service.journal import Writer, events
from gpu_service.runs.run import Run
from tests.fakes.gpu_runs import write_run
from tunesmith.common.v1 import event_pb2


def step(number: int) -> event_pb2.EventPayload:
    return events.wrap(event_pb2.StepEvent(step=number, total_steps=1000))


def state(value: event_pb2.RunState.ValueType) -> event_pb2.EventPayload:
    return events.wrap(event_pb2.RunStateEvent(state=value))


def make(tmp_path: Path, changes: list[str]) -> Run:
    directory = write_run(tmp_path)
    content = {**json.loads((directory / "run.json").read_text()), "device": {"type": "cpu", "index": -1}}
    return Run(directory=directory, content=content, on_change=lambda: changes.append("change"))


async def test_history_comes_in_batches_and_ends_with_the_last_event(tmp_path: Path) -> None:
    run = make(tmp_path, [])
    with Writer.open(run.directory / "journal", 1) as writer:
        for number in range(1, 600):
            writer.append(step(number))
        writer.append(state(event_pb2.RUN_STATE_SUCCEEDED))
    await run.refresh()
    batches = [batch async for batch in run.follow(0)]
    assert [len(batch) for batch in batches] == [256, 256, 88]
    assert [record.run_sequence for batch in batches for record in batch] == list(range(1, 601))
    assert [record.run_sequence async for batch in run.follow(598) for record in batch] == [599, 600]
    assert [batch async for batch in run.follow(600)] == []
    await run.close()


async def test_a_batch_of_long_events_stays_near_a_mebibyte(tmp_path: Path) -> None:
    run = make(tmp_path, [])
    with Writer.open(run.directory / "journal", 1) as writer:
        for _ in range(12):
            writer.append(events.wrap(event_pb2.LogEvent(level="info", message="x" * 200_000)))
        writer.append(state(event_pb2.RUN_STATE_FAILED))
    await run.refresh()
    sizes = [sum(len(record.event) for record in batch) async for batch in run.follow(0)]
    assert len(sizes) > 1
    assert max(sizes) < 1024 * 1024 + 256 * 1024
    await run.close()


async def test_a_watcher_from_before_the_first_event_is_woken_for_each(tmp_path: Path) -> None:
    changes: list[str] = []
    run = make(tmp_path, changes)
    seen: list[int] = []

    async def watch() -> None:
        async for batch in run.follow(0):
            seen.extend(record.run_sequence for record in batch)

    watching = asyncio.create_task(watch())
    with Writer.open(run.directory / "journal", 1) as writer:
        writer.append(state(event_pb2.RUN_STATE_RUNNING))
        await run.refresh()
        assert (run.state, changes) == (RunState.RUNNING, ["change"])
        writer.append(step(1))
        await run.refresh()
        # A step is no change of the run.
        assert changes == ["change"]
        run.note_stop("cancel", 1)
        run.note_stop("checkpoint", 1)
        assert (run.state, run.stop_mode) == (RunState.STOPPING, "cancel")
        writer.append(state(event_pb2.RUN_STATE_CANCELLED))
    run.wake()
    run.wake()
    await asyncio.wait_for(watching, 60)
    assert seen == [1, 2, 3]
    assert run.state is RunState.CANCELLED
    await run.close()


async def test_a_release_ends_watchers(tmp_path: Path) -> None:
    run = make(tmp_path, [])
    watching = asyncio.create_task(anext(run.follow(0), None))
    await asyncio.sleep(0)
    await run.close()
    assert await asyncio.wait_for(watching, 60) is None
