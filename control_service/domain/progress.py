"""What a run's facts do to its job's record: one fold, in the order of the log. Never changes the public state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from control_service.domain.event import Fact, PhaseFact, PlanFact, ResumedFact, RunStateFact, StepFact
from control_service.domain.job import Job, JobProgress


def apply_fact(job: Job, fact: Fact | None) -> Job:
    """The job after one fact of its current attempt; facts that say nothing about the record leave it as it is."""
    fold = _FOLDS.get(type(fact))
    return job if fold is None else fold(job, fact)


def _run_state(job: Job, fact: RunStateFact) -> Job:
    return replace(job, run_state=fact.state, failure=fact.failure or job.failure)


def _phase(job: Job, fact: PhaseFact) -> Job:
    return replace(job, phase=fact.phase)


def _plan(job: Job, fact: PlanFact) -> Job:
    return replace(
        job,
        progress=replace(job.progress, total_steps=fact.num_steps),
        weights_digest=job.weights_digest or fact.weights_digest,
    )


def _step(job: Job, fact: StepFact) -> Job:
    return replace(
        job,
        progress=JobProgress(
            step=fact.step,
            total_steps=fact.total_steps,
            epoch=fact.epoch,
            loss=fact.loss,
            tokens_per_second=fact.tokens_per_second,
            remaining_seconds=fact.remaining_seconds,
        ),
    )


def _resumed(job: Job, fact: ResumedFact) -> Job:
    return replace(job, progress=replace(job.progress, step=fact.from_step))


_FOLDS: Mapping[type, Callable[[Job, Any], Job]] = {
    RunStateFact: _run_state,
    PhaseFact: _phase,
    PlanFact: _plan,
    StepFact: _step,
    ResumedFact: _resumed,
}
