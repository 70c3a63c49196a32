"""A job under every interleaving of its user, its node and crashes of either: only legal moves, and always an end."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from control_service.domain.failure import Failure, Fault
from control_service.domain.job import Job
from control_service.domain.job_state import CAN_PAUSE, ON_NODE, TERMINAL, TRANSITIONS, JobState
from control_service.domain.reconcile import Activity, NodeSight, Observation, Settle, reconcile
from control_service.domain.run import RUN_OVER, ObservedRun, RunKey, RunState, StopMode
from tests.fakes.control_jobs import make_job

MAX_RETRIES = 2


class JobMachine(RuleBasedStateMachine):
    """Carries out what `reconcile` decides against a model of a node."""

    @initialize()
    def begin(self) -> None:
        self.job: Job = make_job(max_retries=MAX_RETRIES)
        # Attempt -> what its node knows of it, and why it failed.
        self.runs: dict[int, RunState] = {}
        self.failures: dict[int, Failure] = {}
        self.agreed: StopMode | None = None
        self.interrupt = False

    # The user.

    @precondition(lambda self: self.job.state not in TERMINAL | {JobState.CANCELLING})
    @rule()
    def cancel(self) -> None:
        resting = self.job.state in (JobState.QUEUED, JobState.PAUSED)
        self._move(JobState.CANCELLED if resting else JobState.CANCELLING)

    @precondition(lambda self: self.job.state in CAN_PAUSE)
    @rule()
    def pause(self) -> None:
        self._move(JobState.PAUSING)

    @precondition(lambda self: self.job.state is JobState.PAUSED)
    @rule()
    def resume(self) -> None:
        self._move(JobState.QUEUED)

    @rule()
    def drain(self) -> None:
        self.interrupt = not self.interrupt

    # The node.

    @precondition(lambda self: self._run() not in (None, *RUN_OVER))
    @rule(
        outcome=st.sampled_from([RunState.SUCCEEDED, RunState.FAILED, RunState.INTERRUPTED]),
        reason=st.sampled_from(["ENGINE_KILLED", "TRAINING", "HANG"]),
    )
    def run_ends_by_itself(self, outcome: RunState, reason: str) -> None:
        self._end_run(outcome, reason)

    @precondition(lambda self: self._run() is RunState.STOPPING)
    @rule()
    def run_stops(self) -> None:
        self._end_run(RunState.CANCELLED if self.agreed is StopMode.CANCEL else RunState.INTERRUPTED)

    @precondition(lambda self: self._run() not in (None, *RUN_OVER))
    @rule()
    def node_loses_the_run(self) -> None:
        del self.runs[self.job.attempt]

    # Control.

    @precondition(lambda self: self.job.state is JobState.QUEUED)
    @rule()
    def dispatch(self) -> None:
        self._move(JobState.DISPATCHING)
        self.job = replace(self.job, attempt=self.job.attempt + 1, run_state=None)
        self.agreed = None

    @rule()
    def control_restarts(self) -> None:
        self.agreed = None

    @rule(sight=st.sampled_from(NodeSight))
    def reconcile_once(self, sight: NodeSight) -> None:
        state = self._run() if sight is NodeSight.ANSWERED else None
        key = RunKey(installation_id="i", job_id=self.job.job_id, attempt=self.job.attempt)
        run = None if state is None else ObservedRun(key=key, spec_digest="d", state=state)
        if state in (RunState.ACCEPTED, RunState.RUNNING):
            self.agreed = None
        seen = Observation(sight=sight, run=run, interrupt=self.interrupt, agreed_stop=self.agreed)
        decision = reconcile(self.job, seen)
        if decision.mark_unreachable is not None:
            self.job = replace(self.job, node_unreachable=decision.mark_unreachable)
        if decision.settle is not None:
            self._settle(decision.settle)
            return
        if decision.mark_running:
            self._move(JobState.RUNNING)
        if decision.stop is not None:
            assert state is not None
            self.runs[self.job.attempt] = RunState.STOPPING
            self.agreed = decision.stop
        if decision.activity is Activity.START:
            self.runs.setdefault(self.job.attempt, RunState.RUNNING)
        elif decision.activity is Activity.FOLLOW:
            self._follow()
        elif decision.activity is Activity.COLLECT and not decision.mark_running:
            self._move(JobState.SUCCEEDED)

    # What must always hold.

    @invariant()
    def retries_are_bounded(self) -> None:
        assert self.job.num_retries <= MAX_RETRIES

    @invariant()
    def an_end_is_explained(self) -> None:
        if self.job.state is JobState.SUCCEEDED:
            assert self.runs[self.job.attempt] is RunState.SUCCEEDED
        if self.job.state is JobState.FAILED:
            assert self.job.failure is not None

    def teardown(self) -> None:
        """With a node that answers and obeys, every job comes to rest in a few turns."""
        if not hasattr(self, "job"):
            return
        self.interrupt = False
        for _ in range(40):
            if self.job.state in TERMINAL or self.job.state is JobState.PAUSED:
                break
            if self.job.state is JobState.QUEUED:
                self.dispatch()
            self.reconcile_once(NodeSight.ANSWERED)
            if self._run() is RunState.STOPPING:
                self.run_stops()
            elif self._run() not in (None, *RUN_OVER) and self.job.state is JobState.RUNNING:
                self._end_run(RunState.SUCCEEDED)
        assert self.job.state in TERMINAL or self.job.state is JobState.PAUSED

    # The model.

    def _run(self) -> RunState | None:
        return self.runs.get(self.job.attempt)

    def _move(self, state: JobState) -> None:
        assert state in TRANSITIONS[self.job.state]
        self.job = self.job.with_state(state)
        if state not in ON_NODE:
            self.job = replace(self.job, node_unreachable=False)

    def _settle(self, settle: Settle) -> None:
        self._move(settle.state)
        num_retries = self.job.num_retries + (1 if settle.counts_as_retry else 0)
        self.job = replace(self.job, failure=settle.failure, num_retries=num_retries)

    def _end_run(self, outcome: RunState, reason: str = "") -> None:
        self.runs[self.job.attempt] = outcome
        if outcome is RunState.FAILED:
            self.failures[self.job.attempt] = Failure(reason=reason, fault=Fault.PLATFORM)

    def _follow(self) -> None:
        outcome = self._run()
        if outcome in RUN_OVER:
            failure = self.failures.get(self.job.attempt, self.job.failure)
            self.job = replace(self.job, run_state=outcome, failure=failure)


TestJobMachine = JobMachine.TestCase
TestJobMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
