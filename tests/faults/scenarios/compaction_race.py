"""R11: logs are compacted, a few events at a time, under watchers that are anywhere in them: each is given events
without a gap, and then either the end or HISTORY_COMPACTED with the oldest sequence that there is."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from control_service.adapters.event_codec import ProtoEventCodec
from control_service.adapters.sql.store import SqlStore
from control_service.app.event_hub import EventHub, EventHubConfig
from control_service.app.store_ports import Transaction
from control_service.domain.errors import OutOfRange
from control_service.domain.event import EventKind, StoredEvent
from control_service.domain.job_state import JobState
from tests.fakes.control_jobs import JOB_ID, NOW, make_job
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2

_NUM_EVENTS = 300
_NUM_WATCHERS = 40
_NUM_ROUNDS = 50


def run(trial: Trial) -> list[Finding]:
    """Many logs, one after the other."""
    return race(trial, num_rounds=_NUM_ROUNDS)


def race(trial: Trial, *, num_rounds: int) -> list[Finding]:
    """In each round one job's log, watchers that began anywhere in it, and a compactor."""
    return asyncio.run(_race(trial, num_rounds))


async def _race(trial: Trial, num_rounds: int) -> list[Finding]:
    seeded = random.Random(trial.seed)
    violations: list[str] = []
    told = 0
    store = await SqlStore.open(trial.directory / "control.sqlite")
    try:
        for number in range(num_rounds):
            job_id = f"{JOB_ID[:-4]}{number:04}"
            await store.transact(lambda tx, job_id=job_id: _end_job(tx, job_id))  # type: ignore[misc]
            config = EventHubConfig(max_page_events=seeded.choice((1, 7, 64)), cache_bytes=seeded.choice((1, 2**20)))
            hub = EventHub(store=store, codec=ProtoEventCodec(), config=config)
            outcomes = await asyncio.gather(
                _compact(store, job_id, seeded),
                *(_watch(hub, store, job_id, seeded) for _ in range(_NUM_WATCHERS)),
            )
            problems = [outcome for outcome in outcomes if outcome]
            violations += [f"round {number}: {problem}" for problem in problems if problem != _TOLD]
            told += problems.count(_TOLD)
    finally:
        await store.close()
    assert told, "no watcher met a compacted log"
    tried = num_rounds * _NUM_WATCHERS
    held = tried - len(violations)
    return [Finding(promise="R11", tried=tried, held=held, violations=tuple(violations))]


def _end_job(tx: Transaction, job_id: str) -> None:
    tx.jobs.insert(make_job(job_id=job_id, state=JobState.SUCCEEDED, end_time=NOW))
    payload = event_pb2.EventPayload(step=event_pb2.StepEvent(step=1)).SerializeToString()
    event = StoredEvent(sequence=0, attempt=0, run_sequence=0, kind=EventKind.STEP, time=NOW, payload=payload)
    tx.events.append(job_id, attempt=0, events=[replace(event) for _ in range(_NUM_EVENTS)])


async def _compact(store: SqlStore, job_id: str, seeded: random.Random) -> str:
    """As the compactor does, in pieces of any size and at any distance."""
    await asyncio.sleep(seeded.uniform(0.0, 0.02))

    def compact(tx: Transaction) -> int:
        return tx.events.compact(job_id, before_sequence=_NUM_EVENTS, limit=seeded.randint(1, 100))

    while await store.transact(compact):  # noqa: ASYNC110 - it is not waited for
        await asyncio.sleep(seeded.choice((0.0, 0.0, 0.002)))
    return ""


_TOLD = "told"


async def _watch(hub: EventHub, store: SqlStore, job_id: str, seeded: random.Random) -> str:
    """What is wrong with what it was given; empty when it was given all, `told` when it was told of the oldest."""
    position = seeded.choice((0, seeded.randrange(_NUM_EVENTS)))
    await asyncio.sleep(seeded.uniform(0.0, 0.03))
    try:
        async for message in hub.watch(job_id, after_sequence=position):
            for event in job_service_pb2.WatchJobResponse.FromString(message).events:
                if event.sequence != position + 1:
                    return f"{event.sequence} came after {position}"
                position = event.sequence
            await asyncio.sleep(seeded.choice((0.0, 0.001, 0.005)))
    except OutOfRange as error:
        if error.reason != "HISTORY_COMPACTED":
            return f"refused with {error.reason}"
        # It may have moved on since.
        now_oldest, _ = await store.read(lambda tx: tx.events.bounds(job_id))
        oldest = int(error.details["oldest_sequence"])
        return _TOLD if position + 1 < oldest <= now_oldest else f"at {position} it was told of {oldest}"
    return "" if position == _NUM_EVENTS else f"it ended at {position} of {_NUM_EVENTS}"


SCENARIO = Scenario(name="compaction_race", promises=("R11",), num_trials=4, trial_seconds=40.0, run=run)
