"""THE decision about a live job: from (job, what its node says) to what to do. Pure and complete: normal work, stop,
pause, cancel, retry and recovery after any crash are the same lines here; there is no other restore path.

The job's own log comes first: `job.run_state` is what the attempt's journal told. Only while the log has no outcome
does it matter what the node says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from control_service.domain import retry
from control_service.domain.failure import Failure, Fault
from control_service.domain.job import Job
from control_service.domain.job_state import ON_NODE, JobState
from control_service.domain.run import RUN_OVER, ObservedRun, RunState, StopMode


class NodeSight(Enum):
    """What control knows of the job's node just now."""

    # The node answered about this attempt; `run` None means that it has no such run.
    ANSWERED = "ANSWERED"
    # Within its lease, but it did not answer, or was not asked.
    SILENT = "SILENT"
    # Not heard from for longer than its lease.
    LOST = "LOST"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is seen besides the job itself."""

    sight: NodeSight
    run: ObservedRun | None = None
    # The operator wants the node's runs to checkpoint and go back to the queue.
    interrupt: bool = False
    # Stop that the node has already agreed to, for this attempt.
    agreed_stop: StopMode | None = None


class Activity(Enum):
    """The one lasting thing that is done for a live job at a time."""

    NONE = "NONE"
    # Push what the node lacks, then StartRun.
    START = "START"
    # Follow the run's events from the stored cursor.
    FOLLOW = "FOLLOW"
    # Copy and verify the artifacts, then SUCCEEDED.
    COLLECT = "COLLECT"


@dataclass(frozen=True, kw_only=True)
class Settle:
    """Move the job to `state`; one that goes back to the queue may count as a retry."""

    state: JobState
    message: str
    failure: Failure | None = None
    # Nothing failed, but the last attempt's failure is still what the job tells of itself.
    keeps_failure: bool = False
    counts_as_retry: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do now. Every part is safe to do again."""

    activity: Activity = Activity.NONE
    # True or False: store that the node is (or no longer is) unreachable.
    mark_unreachable: bool | None = None
    # The node has the attempt: DISPATCHING becomes RUNNING.
    mark_running: bool = False
    stop: StopMode | None = None
    settle: Settle | None = None


def reconcile(job: Job, seen: Observation) -> Decision:
    """Decides for one job."""
    if job.state not in ON_NODE:
        return Decision()
    if job.run_state in RUN_OVER:
        return _after_outcome(job, job.run_state, seen.sight)
    if seen.sight is NodeSight.LOST:
        return Decision(mark_unreachable=None if job.node_unreachable else True)
    if seen.sight is NodeSight.SILENT:
        return Decision()
    mark = False if job.node_unreachable else None
    if seen.run is None:
        return _without_run(job, mark)
    return Decision(
        activity=Activity.FOLLOW,
        mark_unreachable=mark,
        mark_running=job.state is JobState.DISPATCHING,
        stop=_wanted_stop(job, seen),
    )


_WITHOUT_RUN: Mapping[JobState, Settle] = {
    JobState.PAUSING: Settle(state=JobState.PAUSED, message="paused before the node had started it"),
    JobState.CANCELLING: Settle(state=JobState.CANCELLED, message="cancelled; the node has no run of it"),
}

_STOPS: Mapping[JobState, StopMode] = {
    JobState.CANCELLING: StopMode.CANCEL,
    JobState.PAUSING: StopMode.CHECKPOINT,
}

_AFTER_OUTCOME: Mapping[tuple[JobState, RunState], Settle] = {
    (JobState.CANCELLING, RunState.CANCELLED): Settle(state=JobState.CANCELLED, message="cancelled"),
    (JobState.CANCELLING, RunState.INTERRUPTED): Settle(state=JobState.CANCELLED, message="cancelled at a checkpoint"),
    # A run's success is not the job's; who cancels before the artifacts are collected gets none.
    (JobState.CANCELLING, RunState.SUCCEEDED): Settle(state=JobState.CANCELLED, message="cancelled after training"),
    (JobState.PAUSING, RunState.INTERRUPTED): Settle(state=JobState.PAUSED, message="paused at a checkpoint"),
    (JobState.PAUSING, RunState.CANCELLED): Settle(state=JobState.PAUSED, message="paused; the node ended the run"),
    (JobState.RUNNING, RunState.INTERRUPTED): Settle(state=JobState.QUEUED, message="interrupted by its node"),
    (JobState.RUNNING, RunState.CANCELLED): Settle(state=JobState.QUEUED, message="ended by its node"),
    (JobState.DISPATCHING, RunState.INTERRUPTED): Settle(state=JobState.QUEUED, message="interrupted by its node"),
    (JobState.DISPATCHING, RunState.CANCELLED): Settle(state=JobState.QUEUED, message="ended by its node"),
}


def _after_outcome(job: Job, outcome: RunState, sight: NodeSight) -> Decision:
    if outcome is RunState.FAILED:
        return Decision(settle=after_failure(job, job.failure or _untold_failure()))
    settle = _AFTER_OUTCOME.get((job.state, outcome))
    if settle is not None:
        return Decision(settle=settle)
    # Its artifacts may be lost with the node; then another one makes them again from the last checkpoint.
    lost = sight is NodeSight.LOST
    is_told = lost is job.node_unreachable or sight is NodeSight.SILENT
    # SUCCEEDED while DISPATCHING: the node finished before control had stored that it began.
    return Decision(
        activity=Activity.COLLECT,
        mark_running=job.state is JobState.DISPATCHING,
        mark_unreachable=None if is_told else lost,
    )


def after_failure(job: Job, failure: Failure) -> Settle:
    """What a failed attempt means for the job: tried again while the type allows and retries are left."""
    if job.state is JobState.CANCELLING or not retry.is_retried(failure):
        return Settle(state=JobState.FAILED, message=failure.reason, failure=failure)
    if job.retries_left == 0:
        final = retry.exhausted(failure, job.num_retries) if job.num_retries else failure
        return Settle(state=JobState.FAILED, message=final.reason, failure=final)
    return Settle(state=JobState.QUEUED, message=f"retry after {failure.reason}", failure=failure, counts_as_retry=True)


def _without_run(job: Job, mark: bool | None) -> Decision:
    settle = _WITHOUT_RUN.get(job.state)
    if settle is not None:
        return Decision(mark_unreachable=mark, settle=settle)
    if job.state is JobState.DISPATCHING:
        return Decision(activity=Activity.START, mark_unreachable=mark)
    return Decision(mark_unreachable=mark, settle=after_failure(job, retry.attempt_lost(job.node)))


def _wanted_stop(job: Job, seen: Observation) -> StopMode | None:
    wanted = _STOPS.get(job.state)
    if wanted is None and seen.interrupt and job.state is JobState.RUNNING:
        wanted = StopMode.CHECKPOINT
    run_is_over = seen.run is not None and seen.run.is_over
    return None if run_is_over or wanted is seen.agreed_stop else wanted


def _untold_failure() -> Failure:
    return Failure(reason="INTERNAL", fault=Fault.PLATFORM, message="the run failed without a reason")


class LeftoverFate(Enum):
    """What becomes of a run on a node that is not the run of a live job's current attempt."""

    KEEP = "KEEP"
    STOP = "STOP"
    RELEASE = "RELEASE"


def leftover_fate(run: ObservedRun, job: Job | None, *, node: str) -> LeftoverFate:
    """Decides about a run that `node` reports. KEEP also for the current attempt, which `reconcile` sees to.

    Runs of a live job stay until it is over: a later attempt may go on from their checkpoints. So do those of a job
    whose artifacts could not be collected: they are all that is left of the training.
    """
    if job is not None and job.state in ON_NODE and (run.key.attempt, node) == (job.attempt, job.node):
        return LeftoverFate.KEEP
    if not run.is_over:
        return LeftoverFate.STOP
    if job is not None and (not job.is_over or _is_uncollected(job)):
        return LeftoverFate.KEEP
    return LeftoverFate.RELEASE


def _is_uncollected(job: Job) -> bool:
    return job.state is JobState.FAILED and job.run_state is RunState.SUCCEEDED
