"""What must hold of control's records after every commit, and of everything at the end. Reads the store and the nodes'
journals; takes nothing from control's own rules but the table of states."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from control_service.domain.artifact import CheckpointStatus
from control_service.domain.event import EventKind, JobStateFact, NodeReachabilityFact, StoredEvent
from control_service.domain.job import Job
from control_service.domain.job_state import ON_NODE, TERMINAL, TRANSITIONS, JobState
from control_service.domain.run import RunState
from tests.fakes.control_codec import PickleCodec
from tests.faults.simulation.memory_store import Tables
from tests.faults.simulation.node import SimNode

_CODEC = PickleCodec()


class Broken(AssertionError):
    """An invariant does not hold."""


def hold(condition: bool, message: str) -> None:
    """Raises Broken unless the condition is true."""
    if not condition:
        raise Broken(message)


@dataclass
class Watch:
    """Compares the store after a commit with what it was before."""

    num_devices: Mapping[str, int]
    jobs: dict[str, Job] = field(default_factory=dict)
    log_lengths: dict[str, int] = field(default_factory=dict)
    # Node -> seconds of control's own waking time, by its own clock, since its last report.
    silence_seconds: Callable[[str], float] = lambda _: 0.0
    lease_seconds: float = 30.0
    # Node -> something of what it said since that report came late, or not at all.
    was_disturbed: Callable[[str], bool] = lambda _: True
    # How fast control's clocks run.
    clock_rate: float = 1.0
    # Node -> jobs that it said to be too small for, which may be given elsewhere first.
    too_small_for: Mapping[str, set[str]] = field(default_factory=dict)
    # The simulation's own time, and how many lives control has had: what the product's clocks are held to.
    now_seconds: Callable[[], float] = lambda: 0.0
    num_lives: Callable[[], int] = lambda: 0
    # A job was given a new attempt.
    on_dispatch: Callable[[], None] = lambda: None
    num_commits: int = 0
    # Jobs in the order in which they were made.
    _born: dict[str, int] = field(default_factory=dict)
    # Job -> when, and in which life, its retry was decided.
    _failed_at: dict[str, tuple[float, int]] = field(default_factory=dict)

    def begin_anew(self, tables: Tables) -> None:
        """The store was put back from a backup: what was later is no promise any more."""
        self.jobs = dict(tables.jobs)
        self.log_lengths = {job_id: len(log) for job_id, log in tables.events.items()}

    def committed(self, tables: Tables, *, steady_now: datetime) -> None:
        """To be called after every commit."""
        self.num_commits += 1
        hold(self.jobs.keys() <= tables.jobs.keys(), "a job that was acknowledged is gone")
        for job_id in tables.jobs:
            self._born.setdefault(job_id, len(self._born))
        for job_id, job in tables.jobs.items():
            before = self.jobs.get(job_id)
            if before is job:
                continue
            self._check_job(before, job, tables)
            self._check_dispatch(before, job, tables, steady_now)
        self._check_places(tables)
        self.jobs = dict(tables.jobs)

    def _check_job(self, before: Job | None, job: Job, tables: Tables) -> None:
        log = tables.events[job.job_id]
        fresh = log[self.log_lengths.get(job.job_id, 0) :]
        hold(job.last_sequence == len(log), f"log of {job.job_id} ends at {len(log)}, not at {job.last_sequence}")
        for number, event in enumerate(fresh, start=len(log) - len(fresh) + 1):
            hold(event.sequence == number, f"log of {job.job_id} has {event.sequence} at {number}")
        self.log_lengths[job.job_id] = len(log)
        facts = [_decoded(event) for event in fresh]
        states = [fact for fact in facts if isinstance(fact, JobStateFact)]
        for fact in facts:
            if isinstance(fact, NodeReachabilityFact) and not fact.reachable:
                silence = self.silence_seconds(fact.node)
                hold(silence >= self.lease_seconds - 6.0, f"{fact.node} was given up after {silence:.1f} s")
                hold(self.was_disturbed(fact.node), f"{fact.node} was given up although all it said came")
        if before is None:
            hold([fact.state for fact in states][:1] == [JobState.QUEUED], "a new job is not queued")
            return
        hold(not (before.state in TERMINAL and fresh), f"the log of {job.job_id} grew after its end")
        state = before.state
        for fact in states:
            hold(fact.previous_state is state, f"{job.job_id}: {fact.previous_state} is told of, {state} it was")
            hold(fact.state in TRANSITIONS[state], f"{job.job_id}: {state} became {fact.state}")
            state = fact.state
        hold(state is job.state, f"{job.job_id} is {job.state}, its log says {state}")
        hold(job.attempt >= before.attempt, f"the epoch of {job.job_id} fell")
        if job.attempt != before.attempt:
            hold(
                any(fact.state is JobState.DISPATCHING for fact in states), f"the epoch of {job.job_id} rose by itself"
            )
        if job.num_retries > before.num_retries:
            self._failed_at[job.job_id] = (self.now_seconds(), self.num_lives())
        hold(before.num_retries <= job.num_retries <= job.max_retries, f"{job.job_id}: {job.num_retries} retries")
        self._check_attempts(job, fresh)
        if job.end_time is not None:
            begun = job.start_time or job.create_time
            hold(job.end_time >= max(begun, job.create_time), f"{job.job_id} ended before it began")

    def _check_attempts(self, job: Job, fresh: Sequence[StoredEvent]) -> None:
        for earlier, event in itertools.pairwise(fresh):
            hold(earlier.attempt <= event.attempt, f"{job.job_id}: attempt {event.attempt} after {earlier.attempt}")
        runs = [event for event in fresh if event.run_sequence]
        hold(all(e.attempt == job.attempt for e in runs), f"{job.job_id}: events of an attempt that is over")

    def _check_dispatch(self, before: Job | None, job: Job, tables: Tables, steady_now: datetime) -> None:
        if before is None or job.attempt == before.attempt:
            return
        self.on_dispatch()
        failed_at, life = self._failed_at.pop(job.job_id, (0.0, -1))
        if life == self.num_lives():
            waited, due = (self.now_seconds() - failed_at) * self.clock_rate, min(60.0, 2.0 ** (job.num_retries - 1))
            hold(waited > due - 0.05, f"{job.job_id} was tried again after {waited:.2f} s, not {due:.2f} s")
        for other in self.jobs.values():
            if other.state is JobState.QUEUED and other.job_id != job.job_id and self._goes_before(other, before):
                waits = other.not_before is not None and other.not_before > steady_now - timedelta(seconds=0.01)
                waits |= other.job_id in self.too_small_for.get(job.node, ())
                still_waits = tables.jobs[other.job_id].state is JobState.QUEUED
                hold(
                    waits or not still_waits or _bound_elsewhere(other, job.node, tables),
                    f"{job.job_id} was dispatched to {job.node} before {other.job_id}",
                )

    def _goes_before(self, other: Job, job: Job) -> bool:
        moves = job.state is not JobState.QUEUED
        return moves or (-other.priority, self._born[other.job_id]) < (-job.priority, self._born[job.job_id])

    def _check_places(self, tables: Tables) -> None:
        taken: dict[str, int] = {}
        for job in tables.jobs.values():
            if job.state in ON_NODE:
                taken[job.node] = taken.get(job.node, 0) + 1
        for node, count in taken.items():
            hold(count <= self.num_devices[node], f"{count} jobs on {node}, which has {self.num_devices[node]} devices")


def _bound_elsewhere(job: Job, node: str, tables: Tables) -> bool:
    kept = [
        checkpoint
        for (owner, _), checkpoint in tables.checkpoints.items()
        if owner == job.job_id and checkpoint.status is not CheckpointStatus.DELETED
    ]
    if not kept or any(checkpoint.status is CheckpointStatus.REPLICATED for checkpoint in kept):
        return False
    return max(kept, key=lambda checkpoint: checkpoint.step).node != node


def check_end(tables: Tables, nodes: Sequence[SimNode], outputs: Mapping[str, Mapping[str, bytes]]) -> None:
    """Everything that must be true once every job is over."""
    runs = {(node.name, run.name): run for node in nodes for run in node.history}
    for job_id, job in tables.jobs.items():
        hold(job.is_over, f"{job_id} is {job.state}")
        log = tables.events[job_id]
        _check_log(job, log, nodes)
        if job.state is JobState.SUCCEEDED:
            files = outputs.get(f"{job.output_path}/adapter", {})
            hold(files == {"adapter_model.safetensors": f"adapter of {job_id}".encode()}, f"output of {job_id}")
            run = runs[job.node, f"{job_id}/{job.attempt}"]
            hold(run.state is RunState.SUCCEEDED, f"{job_id} SUCCEEDED, its run is {run.state}")
        if job.state is JobState.FAILED:
            hold(job.failure is not None, f"{job_id} FAILED without a reason")


def _check_log(job: Job, log: Sequence[StoredEvent], nodes: Sequence[SimNode]) -> None:
    """What came from runs is, attempt by attempt, what one run's journal has, in its order."""
    told: dict[int, list[StoredEvent]] = {}
    for event in log:
        if event.run_sequence:
            told.setdefault(event.attempt, []).append(event)
    hold(list(told) == sorted(told), f"attempts of {job.job_id} are mixed in its log")
    for attempt, events in told.items():
        numbers = [event.run_sequence for event in events]
        hold(numbers == list(range(1, len(numbers) + 1)), f"run sequences of {job.job_id}/{attempt}: {numbers}")
        journals = [
            run for node in nodes for run in node.history if run.name == f"{job.job_id}/{attempt}" and run.journal
        ]
        payloads = [event.payload for event in events]
        whole = any(payloads == [event.payload for event in run.journal[: len(payloads)]] for run in journals)
        hold(whole or any(run.torn for run in journals), f"{job.job_id}/{attempt}: its log is of no journal")


def _decoded(event: StoredEvent) -> object:
    kinds = (EventKind.JOB_STATE, EventKind.NODE_REACHABILITY)
    return _CODEC.decode(event.kind, event.payload) if event.kind in kinds else None
