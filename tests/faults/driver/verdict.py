"""What the evidence of a world amounts to: the offline checker's findings, and what only the driver has seen."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tests.faults.checker import check
from tests.faults.checker.database import Row, read_database
from tests.faults.driver.services import CONTROL
from tests.faults.driver.world import World
from tests.faults.scenario import Finding
from tunesmith.common.v1 import event_pb2

ADOPTION_LIMIT_SECONDS = 10.0
# Of a failure: what is told apart from its other facts, or is the same for all.
_OWN_WORDS = frozenset({"reason", "message", "versions"})


def judge(world: World) -> list[Finding]:
    """The checker's findings. The services are stopped."""
    return list(check(world.evidence.directory))


def ended_as_asked(world: World, states: Mapping[str, int], asked: Mapping[str, Collection[int]]) -> Finding:
    """R4: no fault made a job end in another way than its owner wanted; `asked` has the states it may end in.

    A violation says why the job failed. The services are stopped.
    """
    wrong = [job_id for job_id, may in asked.items() if states[job_id] not in may]
    jobs = read_database(world.control_directory).jobs if wrong else {}
    return Finding(
        promise="R4",
        tried=len(asked),
        held=len(asked) - len(wrong),
        violations=tuple(f"job {job_id} ended {_name(states[job_id])}{_why(jobs[job_id])}" for job_id in wrong),
    )


def _name(state: int) -> str:
    return event_pb2.JobState.DESCRIPTOR.values_by_number[state].name


def _why(job: Row) -> str:
    """What control's record says of the failure; empty when there is none."""
    failure = job["failure"]
    if failure is None:
        return ""
    told = {name: value for name, value in failure.items() if value not in ("", None, {}) and name not in _OWN_WORDS}
    facts = ", ".join(f"{name} {value}" for name, value in told.items())
    return (
        f" in attempt {job['attempt']} after {job['num_retries']} of {job['max_retries']} retries: "
        f"{failure['reason']}: {failure['message']} ({facts})"
    )


def came_back(world: World) -> list[Finding]:
    """R6: every GPU server that was killed served again, with its runs, within the limit.

    A trial may stop one that is on its way back: that time is the trial's own, and is not counted.
    """
    faults = world.evidence.read("faults")
    seconds = [
        start.seconds(faults)
        for service in world.services.values()
        if service.name != CONTROL
        for start in service.starts[1:]
    ]
    if not seconds:
        return []
    late = [f"a GPU server needed {took:.1f} s" for took in seconds if took > ADOPTION_LIMIT_SECONDS]
    return [
        Finding(
            promise="R6",
            tried=len(seconds),
            held=len(seconds) - len(late),
            violations=tuple(late),
            worst=max(seconds),
            unit="s",
            what="from a GPU server's restart until it serves, with its live runs adopted",
        )
    ]
