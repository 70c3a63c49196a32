"""What control's promises hang on when it decides about jobs."""

from __future__ import annotations

from tests.faults.mutations.mutation import Mutation

_RECOVERY = "tests/integration/control_core/test_recovery.py::"
_STATES = "tests/unit/control/test_ids_and_states.py::"
_RECONCILE = "tests/unit/control/test_reconcile.py::"
_FENCES = "tests/contract/control/test_fences.py::"
_KEPT = "tests/integration/control_core/test_kept_bytes.py::"

JOBS = (
    Mutation(
        name="what-is-over-can-go-on",
        promise="R7",
        file="control_service/domain/job_state.py",
        snippet="    _OK: frozenset(),",
        replacement="    _OK: frozenset({_Q}),",
        tests=(
            f"{_STATES}test_every_state_is_in_the_table_and_reachable_and_terminal_means_terminal",
            f"{_STATES}test_a_transition_that_is_not_in_the_table_is_refused",
        ),
    ),
    Mutation(
        name="states-are-not-checked",
        promise="R7",
        file="control_service/domain/job_state.py",
        snippet="if following not in TRANSITIONS[previous]:",
        replacement="if False:",
        tests=(f"{_STATES}test_a_transition_that_is_not_in_the_table_is_refused",),
    ),
    Mutation(
        name="the-node-is-asked-before-the-log",
        promise="R7",
        file="control_service/domain/reconcile.py",
        snippet="    if job.run_state in RUN_OVER:\n        return _after_outcome(job, job.run_state, seen.sight)\n",
        replacement="",
        tests=(f"{_RECONCILE}test_table", f"{_RECONCILE}test_settled"),
    ),
    Mutation(
        name="a-lost-node-has-no-run",
        promise="R4",
        file="control_service/domain/reconcile.py",
        snippet="        return Decision(mark_unreachable=None if job.node_unreachable else True)",
        replacement="        return _without_run(job, None)",
        tests=(f"{_RECONCILE}test_table",),
    ),
    Mutation(
        name="a-decision-is-carried-out-on-whatever-the-job-became",
        promise="R3",
        file="control_service/app/settle.py",
        snippet="if current is None or current.attempt != job.attempt or current.state is not job.state:",
        replacement="if current is None:",
        tests=(f"{_FENCES}test_a_decision_about_what_a_job_was_moves_nothing",),
    ),
    Mutation(
        name="an-old-answer-makes-a-new-attempt-running",
        promise="R3",
        file="control_service/app/attempts.py",
        snippet="                return\n            change_state(",
        replacement="                pass\n            change_state(",
        tests=(f"{_FENCES}test_an_answer_to_an_older_attempt_makes_nothing_running",),
    ),
    Mutation(
        name="an-attempt-has-the-number-of-the-last",
        promise="R3",
        file="control_service/app/scheduler.py",
        snippet=" + 1,\n                node=node,",
        replacement=" + 0,\n                node=node,",
        tests=(f"{_RECOVERY}test_a_killed_engine_is_retried_from_its_last_checkpoint",),
    ),
    Mutation(
        name="a-lease-never-ends",
        promise="R4",
        file="control_service/app/node_monitor.py",
        snippet="if now - heard < lease:",
        replacement="if True:",
        tests=(
            "tests/integration/control_core/test_node_monitor.py::test_a_node_is_lost_when_its_lease_ends_and_not_before",
        ),
    ),
    Mutation(
        name="runs-of-older-attempts-go-on",
        promise="R3",
        file="control_service/domain/reconcile.py",
        snippet="    if not run.is_over:\n        return LeftoverFate.STOP",
        replacement="    if not run.is_over:\n        return LeftoverFate.KEEP",
        tests=(f"{_RECONCILE}test_leftovers",),
    ),
    Mutation(
        name="checkpoints-of-live-jobs-are-released",
        promise="R4",
        file="control_service/domain/reconcile.py",
        snippet="if job is not None and (not job.is_over or _is_uncollected(job)):",
        replacement="if job is not None and _is_uncollected(job):",
        tests=(f"{_RECONCILE}test_leftovers",),
    ),
    Mutation(
        name="all-that-is-left-of-a-training-is-released",
        promise="R7",
        file="control_service/domain/reconcile.py",
        snippet="if job is not None and (not job.is_over or _is_uncollected(job)):",
        replacement="if job is not None and not job.is_over:",
        tests=(f"{_RECONCILE}test_leftovers",),
    ),
    Mutation(
        name="an-attempt-goes-on-from-what-was-deleted",
        promise="R4",
        file="control_service/domain/resume.py",
        snippet="for checkpoint in checkpoints if checkpoint.status is not CheckpointStatus.DELETED]",
        replacement="for checkpoint in checkpoints]",
        tests=(f"{_RECONCILE}test_where_a_job_goes_on_from",),
    ),
    Mutation(
        name="control-forgets-its-copy-with-the-nodes",
        promise="R4",
        file="control_service/app/ingest.py",
        snippet="kept = earlier.status is CheckpointStatus.REPLICATED",
        replacement="kept = False",
        tests=(f"{_KEPT}test_a_copy_outlives_the_checkpoint_on_its_node",),
    ),
    Mutation(
        name="a-quarantined-device-is-given-a-job",
        promise="R15",
        file="control_service/domain/queue_policy.py",
        snippet="usable = sum(1 for device in view.report.devices if not device.quarantine_reason)",
        replacement="usable = len(view.report.devices)",
        tests=("tests/unit/control/test_queue_policy.py::test_a_quarantined_device_gets_no_job",),
    ),
    Mutation(
        name="a-twin-may-have-the-data-directory",
        promise="R31",
        file="control_service/data_directory.py",
        snippet="fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        replacement="pass",
        tests=(
            "tests/unit/control_edge/test_process_parts.py::test_a_locked_directory_is_refused_and_free_again_afterwards",
        ),
    ),
    Mutation(
        name="a-twin-may-have-the-port",
        promise="R31",
        file="control_service/api/server_options.py",
        snippet='("grpc.so_reuseport", 0),',
        replacement='("grpc.so_reuseport", 1),',
        tests=(
            "tests/integration/control/test_process.py::test_a_second_process_refuses_and_leaves_the_first_unharmed",
        ),
    ),
)
