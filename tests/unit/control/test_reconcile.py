"""The one decision about a live job, as a table, and as a property over everything that can be seen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from control_service.domain.artifact import Checkpoint, CheckpointStatus, FileReference
from control_service.domain.failure import Failure, Fault
from control_service.domain.job import Job
from control_service.domain.job_state import ON_NODE, TERMINAL, TRANSITIONS, JobState
from control_service.domain.reconcile import (
    Activity,
    Decision,
    LeftoverFate,
    NodeSight,
    Observation,
    leftover_fate,
    reconcile,
)
from control_service.domain.resume import bound_node, resume_from
from control_service.domain.retry import RETRIED_REASONS, back_off_seconds
from control_service.domain.run import RUN_OVER, ObservedRun, RunKey, RunState, StopMode
from tests.fakes.control_jobs import NOW, make_job

JOB = make_job(attempt=1, node="a")
KILLED = Failure(reason="ENGINE_KILLED", fault=Fault.HARDWARE)
PLANNER_KILLED = Failure(reason="PLANNING", fault=Fault.PLATFORM, signal=9)
PLANNER_STARVED = Failure(reason="HOST_OUT_OF_MEMORY", fault=Fault.HARDWARE, stage="PLANNING")
PLANNER_FAILED = Failure(reason="PLANNING", fault=Fault.PLATFORM, exit_status=1)


def _job(state: JobState, run_state: RunState | None = None, **changes: object) -> Job:
    return replace(JOB, state=state, run_state=run_state, **changes)  # type: ignore[arg-type]


def _seen(state: RunState | None = RunState.RUNNING, **changes: object) -> Observation:
    key = RunKey(installation_id="i", job_id=JOB.job_id, attempt=1)
    run = None if state is None else ObservedRun(key=key, spec_digest="d", state=state)
    return replace(Observation(sight=NodeSight.ANSWERED, run=run), **changes)  # type: ignore[arg-type]


LOST = Observation(sight=NodeSight.LOST)
SILENT = Observation(sight=NodeSight.SILENT)
D, R, PG, CG = JobState.DISPATCHING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING
FOLLOW = Decision(activity=Activity.FOLLOW)

TABLE: list[tuple[str, Job, Observation, Decision]] = [
    ("normal work", _job(R), _seen(), FOLLOW),
    ("the node has nothing yet", _job(D), _seen(None), Decision(activity=Activity.START)),
    ("the node has it", _job(D), _seen(RunState.ACCEPTED), replace(FOLLOW, mark_running=True)),
    ("the run is over, its log is not", _job(R), _seen(RunState.SUCCEEDED), FOLLOW),
    ("trained", _job(R, RunState.SUCCEEDED), SILENT, Decision(activity=Activity.COLLECT)),
    (
        "trained, node lost",
        _job(R, RunState.SUCCEEDED),
        LOST,
        Decision(activity=Activity.COLLECT, mark_unreachable=True),
    ),
    (
        "trained, node lost as is known",
        _job(R, RunState.SUCCEEDED, node_unreachable=True),
        LOST,
        Decision(activity=Activity.COLLECT),
    ),
    (
        "trained, node back",
        _job(R, RunState.SUCCEEDED, node_unreachable=True),
        _seen(None),
        Decision(activity=Activity.COLLECT, mark_unreachable=False),
    ),
    ("trained before the pause", _job(PG, RunState.SUCCEEDED), SILENT, Decision(activity=Activity.COLLECT)),
    ("cancel", _job(CG), _seen(), replace(FOLLOW, stop=StopMode.CANCEL)),
    ("cancel, agreed", _job(CG), _seen(agreed_stop=StopMode.CANCEL), FOLLOW),
    ("cancel after pause", _job(CG), _seen(agreed_stop=StopMode.CHECKPOINT), replace(FOLLOW, stop=StopMode.CANCEL)),
    ("pause", _job(PG), _seen(), replace(FOLLOW, stop=StopMode.CHECKPOINT)),
    ("drain", _job(R), _seen(interrupt=True), replace(FOLLOW, stop=StopMode.CHECKPOINT)),
    ("silent", _job(R), SILENT, Decision()),
    ("lost", _job(R), LOST, Decision(mark_unreachable=True)),
    ("lost and known", _job(R, node_unreachable=True), LOST, Decision()),
    ("back", _job(R, node_unreachable=True), _seen(), replace(FOLLOW, mark_unreachable=False)),
    ("cancel while lost", _job(CG), LOST, Decision(mark_unreachable=True)),
]


@pytest.mark.parametrize(("job", "seen", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_table(job: Job, seen: Observation, expected: Decision) -> None:
    assert reconcile(job, seen) == expected


SETTLED: list[tuple[str, Job, Observation, JobState, bool]] = [
    ("cancelled", _job(CG, RunState.CANCELLED), SILENT, JobState.CANCELLED, False),
    ("cancelled at a checkpoint", _job(CG, RunState.INTERRUPTED), SILENT, JobState.CANCELLED, False),
    ("cancelled after training", _job(CG, RunState.SUCCEEDED), SILENT, JobState.CANCELLED, False),
    ("failed before the cancel", _job(CG, RunState.FAILED, failure=KILLED), SILENT, JobState.FAILED, False),
    ("cancelled, node has nothing", _job(CG), _seen(None), JobState.CANCELLED, False),
    ("paused", _job(PG, RunState.INTERRUPTED), SILENT, JobState.PAUSED, False),
    ("paused, node has nothing", _job(PG), _seen(None), JobState.PAUSED, False),
    ("interrupted", _job(R, RunState.INTERRUPTED), SILENT, JobState.QUEUED, False),
    ("killed", _job(R, RunState.FAILED, failure=KILLED), SILENT, JobState.QUEUED, True),
    ("killed while pausing", _job(PG, RunState.FAILED, failure=KILLED), SILENT, JobState.QUEUED, True),
    ("killed, no retry", _job(R, RunState.FAILED, failure=KILLED, max_retries=0), SILENT, JobState.FAILED, False),
    ("planner starved", _job(R, RunState.FAILED, failure=PLANNER_STARVED), SILENT, JobState.QUEUED, True),
    ("planner killed", _job(R, RunState.FAILED, failure=PLANNER_KILLED), SILENT, JobState.QUEUED, True),
    ("planner failed", _job(R, RunState.FAILED, failure=PLANNER_FAILED), SILENT, JobState.FAILED, False),
    ("lost by its node", _job(R), _seen(None), JobState.QUEUED, True),
]


@pytest.mark.parametrize(
    ("job", "seen", "state", "counts"), [row[1:] for row in SETTLED], ids=[row[0] for row in SETTLED]
)
def test_settled(job: Job, seen: Observation, state: JobState, counts: bool) -> None:
    settle = reconcile(job, seen).settle
    assert settle is not None
    assert (settle.state, settle.counts_as_retry) == (state, counts)


def test_every_decision_is_one_that_the_state_table_allows_and_a_cancel_never_requeues() -> None:
    failures = (None, KILLED, Failure(reason="TRAINING", fault=Fault.PLATFORM))
    runs = [_seen(state, interrupt=interrupt) for state in (None, *RunState) for interrupt in (False, True)]
    for state, run_state, failure, seen, lost in itertools.product(
        JobState, (None, *RunState), failures, [LOST, SILENT, *runs], (False, True)
    ):
        job = _job(state, run_state, failure=failure, node_unreachable=lost)
        decision = reconcile(job, seen)
        if state not in ON_NODE:
            assert decision == Decision()
        if decision.settle is not None:
            assert decision.settle.state in TRANSITIONS[state]
            assert decision.activity is Activity.NONE
            if state is JobState.CANCELLING:
                assert decision.settle.state in TERMINAL
        if decision.mark_running:
            assert state is JobState.DISPATCHING
        if state in ON_NODE and run_state in RUN_OVER:
            # An outcome in the log always leads somewhere, whatever the node says.
            assert decision.settle is not None or decision.activity is Activity.COLLECT


def test_what_the_user_must_change_is_never_tried_again() -> None:
    for reason in RETRIED_REASONS:
        job = _job(R, RunState.FAILED, failure=Failure(reason=reason, fault=Fault.USER))
        settle = reconcile(job, SILENT).settle
        assert settle is not None
        assert settle.state is JobState.FAILED


def test_back_off_grows_to_a_limit() -> None:
    assert [back_off_seconds(n) for n in (1, 2, 3, 100)] == [1.0, 2.0, 4.0, 60.0]


@pytest.mark.parametrize(
    ("run_state", "job", "fate"),
    [
        (RunState.RUNNING, _job(R), LeftoverFate.KEEP),
        (RunState.SUCCEEDED, _job(R), LeftoverFate.KEEP),
        (RunState.RUNNING, _job(R, attempt=2), LeftoverFate.STOP),
        (RunState.RUNNING, _job(JobState.QUEUED), LeftoverFate.STOP),
        (RunState.RUNNING, _job(JobState.CANCELLED), LeftoverFate.STOP),
        (RunState.RUNNING, None, LeftoverFate.STOP),
        (RunState.INTERRUPTED, _job(JobState.PAUSED), LeftoverFate.KEEP),
        (RunState.INTERRUPTED, _job(R, attempt=2), LeftoverFate.KEEP),
        (RunState.SUCCEEDED, _job(JobState.SUCCEEDED), LeftoverFate.RELEASE),
        (RunState.FAILED, _job(JobState.FAILED, RunState.FAILED), LeftoverFate.RELEASE),
        (RunState.SUCCEEDED, _job(JobState.FAILED, RunState.SUCCEEDED), LeftoverFate.KEEP),
        (RunState.CANCELLED, None, LeftoverFate.RELEASE),
    ],
)
def test_leftovers(run_state: RunState, job: Job | None, fate: LeftoverFate) -> None:
    run = _seen(run_state).run
    assert run is not None
    assert leftover_fate(run, job, node="a") is fate


def test_an_attempt_of_the_same_number_on_another_node_is_a_leftover() -> None:
    # After a restore from a backup: the attempt was dispatched before, by a control that nobody remembers.
    run = _seen(RunState.RUNNING).run
    assert run is not None
    assert leftover_fate(run, _job(R), node="b") is LeftoverFate.STOP


def _checkpoint(step: int, status: CheckpointStatus, node: str = "a") -> Checkpoint:
    file = FileReference(path="f", sha256=f"{step:064x}", size_bytes=1)
    return Checkpoint(
        job_id=JOB.job_id,
        attempt=1,
        name=f"step-{step:08d}",
        step=step,
        status=status,
        size_bytes=1,
        manifest_sha256="",
        files=(file,),
        node=node,
        create_time=NOW,
    )


def test_where_a_job_goes_on_from() -> None:
    committed, replicated = CheckpointStatus.COMMITTED, CheckpointStatus.REPLICATED
    assert (bound_node([]), resume_from([], "a")) == ("", None)
    only_there = [_checkpoint(10, committed)]
    assert bound_node(only_there) == "a"
    assert resume_from(only_there, "b") is None
    both = [_checkpoint(10, replicated), _checkpoint(20, committed)]
    assert bound_node(both) == ""
    here, there = resume_from(both, "a"), resume_from(both, "b")
    assert here is not None
    assert there is not None
    assert (here.step, here.files) == (20, ())
    assert (there.step, len(there.files)) == (10, 1)
    assert resume_from([_checkpoint(10, CheckpointStatus.DELETED)], "a") is None
