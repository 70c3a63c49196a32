"""THE state machine of a job: every state, every legal transition, in one table. Changes nothing by itself."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from control_service.domain.errors import FailedPrecondition


class JobState(StrEnum):
    """Public states; the names are those of the proto enum without its prefix. -ING is on its way, -ED rests."""

    QUEUED = "QUEUED"
    DISPATCHING = "DISPATCHING"
    RUNNING = "RUNNING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


_Q, _D, _R = JobState.QUEUED, JobState.DISPATCHING, JobState.RUNNING
_PG, _PD, _CG = JobState.PAUSING, JobState.PAUSED, JobState.CANCELLING
_OK, _F, _CD = JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    # FAILED from QUEUED: the node refused the plan when it could at last be asked, or no retry is left.
    _Q: frozenset({_D, _CD, _F}),
    # QUEUED from DISPATCHING: the node was busy or gone; nothing ran.
    _D: frozenset({_R, _Q, _F, _CG, _PG}),
    # QUEUED from RUNNING: the attempt was lost or interrupted.
    _R: frozenset({_OK, _F, _Q, _PG, _CG}),
    # QUEUED from PAUSING: the attempt was lost before its checkpoint, so there is nothing to rest on.
    _PG: frozenset({_PD, _OK, _F, _Q, _CG}),
    _PD: frozenset({_Q, _CD}),
    # FAILED from CANCELLING: the run failed before the cancel reached it; what was recorded is the outcome.
    _CG: frozenset({_CD, _F}),
    _OK: frozenset(),
    _F: frozenset(),
    _CD: frozenset(),
}

TERMINAL: frozenset[JobState] = frozenset(state for state, following in TRANSITIONS.items() if not following)
# States in which a node may hold a run of the job's current attempt.
ON_NODE: frozenset[JobState] = frozenset({_D, _R, _PG, _CG})
# States from which a verb of the API may start.
CAN_PAUSE: frozenset[JobState] = frozenset({_D, _R})
CAN_RESUME: frozenset[JobState] = frozenset({_PD})
CAN_RETRY: frozenset[JobState] = frozenset({_F, _CD})
CAN_EXPORT: frozenset[JobState] = TERMINAL


def check_transition(previous: JobState, following: JobState) -> None:
    """Refuses a transition that the table does not have: FAILED_PRECONDITION, JOB_STATE."""
    if following not in TRANSITIONS[previous]:
        raise FailedPrecondition(
            "JOB_STATE",
            f"a job that is {previous} cannot become {following}",
            details={"state": previous.value, "wanted_state": following.value},
        )


def check_verb(verb: str, state: JobState, allowed: frozenset[JobState]) -> None:
    """Refuses an API verb in a state that does not allow it: FAILED_PRECONDITION, JOB_STATE."""
    if state not in allowed:
        names = ", ".join(sorted(allowed))
        raise FailedPrecondition(
            "JOB_STATE",
            f"cannot {verb} a job that is {state}; it must be one of: {names}",
            details={"state": state.value},
        )
