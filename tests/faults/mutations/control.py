"""What control's promises hang on: its store, its log, its decisions about jobs, and the bytes that it keeps."""

from __future__ import annotations

from tests.faults.mutations.mutation import Mutation

_STORE = "tests/contract/control/test_store.py::"
_PACING = "tests/unit/control/test_pacing.py::"
_RECOVERY = "tests/integration/control_core/test_recovery.py::"
_REQUESTS = "tests/integration/control_core/test_requests.py::"
_STOPPING = "tests/integration/control_core/test_stopping.py::"
_COMPACTION = "tests/integration/control_core/test_compaction.py::"
_STATES = "tests/unit/control/test_ids_and_states.py::"
_RECONCILE = "tests/unit/control/test_reconcile.py::"
_BLOBS = "tests/unit/control_edge/test_blobs.py::"
_DURABLE = "tests/unit/faults/test_durable_writes.py::"
_FENCES = "tests/contract/control/test_fences.py::"
_KEPT = "tests/integration/control_core/test_kept_bytes.py::"

STORE = (
    Mutation(
        name="commits-are-not-synced",
        promise="R1",
        file="control_service/adapters/sql/engine.py",
        snippet='"synchronous": 2,',
        replacement='"synchronous": 1,',
        tests=(f"{_STORE}test_commits_are_durable_and_readers_cannot_write",),
    ),
    Mutation(
        name="a-failed-change-is-not-undone",
        promise="R1",
        file="control_service/adapters/sql/store.py",
        snippet='exec_driver_sql("ROLLBACK TO work")',
        replacement='exec_driver_sql("SELECT 1")',
        tests=(f"{_STORE}test_an_exception_undoes_its_own_writes_and_reaches_its_caller",),
    ),
    Mutation(
        name="an-answer-comes-without-its-commit",
        promise="R1",
        file="control_service/adapters/sql/store.py",
        snippet='self._connection.exec_driver_sql("COMMIT")',
        replacement='self._connection.exec_driver_sql("ROLLBACK")',
        tests=(f"{_STORE}test_a_job_survives_the_database_unchanged",),
    ),
    Mutation(
        name="no-revision-is-compared",
        promise="R3",
        file="control_service/adapters/sql/statements.py",
        snippet='.where(_jobs.job_id == sa.bindparam("at_job_id"), _jobs.revision == sa.bindparam("at_revision"))',
        replacement='.where(_jobs.job_id == sa.bindparam("at_job_id"))',
        tests=(f"{_STORE}test_an_update_of_an_old_revision_is_refused",),
    ),
    Mutation(
        name="no-row-of-a-request",
        promise="R2",
        file="control_service/app/idempotency.py",
        snippet="    if request is not None and request.request_id:\n        tx.requests.delete_older_than",
        replacement="    if False:\n        tx.requests.delete_older_than",
        tests=(f"{_REQUESTS}test_parallel_calls_with_one_request_id_make_one_job",),
    ),
    Mutation(
        name="another-body-is-the-same-request",
        promise="R2",
        file="control_service/app/idempotency.py",
        snippet="if record.body_digest != request.body_digest:",
        replacement="if False:",
        tests=(f"{_REQUESTS}test_parallel_calls_with_one_request_id_make_one_job",),
    ),
    Mutation(
        name="requests-are-forgotten-at-once",
        promise="R2",
        file="control_service/app/idempotency.py",
        snippet="tx.requests.delete_older_than(now - KEEP)",
        replacement="tx.requests.delete_older_than(now + KEEP)",
        tests=(f"{_FENCES}test_a_request_is_known_for_seven_days",),
    ),
    Mutation(
        name="requests-have-no-unique-key",
        promise="R2",
        file="control_service/adapters/sql/migrations/versions/0001_first_tables.py",
        snippet='sa.PrimaryKeyConstraint("method", "request_id", name=op.f("pk_requests")),',
        replacement="",
        tests=(f"{_FENCES}test_a_request_has_one_row",),
    ),
)

LOG = (
    Mutation(
        name="events-of-any-attempt-are-stored",
        promise="R3",
        file="control_service/adapters/sql/event_log.py",
        snippet='if row is None or row["attempt"] != attempt:',
        replacement="if row is None:",
        tests=(f"{_STORE}test_sequences_have_no_gap_and_run_events_are_stored_once",),
    ),
    Mutation(
        name="events-are-taken-after-the-end-of-a-job",
        promise="R3",
        file="control_service/app/ingest.py",
        snippet="if job.attempt != attempt or job.state not in ON_NODE:",
        replacement="if job.attempt != attempt:",
        tests=(f"{_FENCES}test_a_job_that_is_on_no_node_takes_no_event_of_a_run",),
    ),
    Mutation(
        name="events-that-came-before-are-stored-again",
        promise="R8",
        file="control_service/adapters/sql/event_log.py",
        snippet=" for event in events if event.run_sequence > cursor]",
        replacement=" for event in events]",
        tests=(
            f"{_STORE}test_sequences_have_no_gap_and_run_events_are_stored_once",
            f"{_RECOVERY}test_the_same_batch_twice_is_stored_once",
        ),
    ),
    Mutation(
        name="a-gap-in-a-run-is-stored",
        promise="R8",
        file="control_service/adapters/sql/event_log.py",
        snippet="if [event.run_sequence for event in fresh] != list(expected):",
        replacement="if False:",
        tests=(f"{_STORE}test_sequences_have_no_gap_and_run_events_are_stored_once",),
    ),
    Mutation(
        name="events-have-no-unique-key",
        promise="R8",
        file="control_service/adapters/sql/migrations/versions/0001_first_tables.py",
        snippet='        sa.UniqueConstraint("job_id", "attempt", "run_sequence", '
        'name=op.f("uq_events_job_id_attempt_run_sequence")),\n',
        replacement="",
        tests=(f"{_FENCES}test_an_event_of_a_run_has_one_row",),
    ),
    Mutation(
        name="the-cursor-does-not-move-with-the-events",
        promise="R8",
        file="control_service/adapters/sql/event_log.py",
        snippet="run_cursor=fresh[-1].run_sequence)",
        replacement="run_cursor=cursor)",
        tests=(f"{_STORE}test_sequences_have_no_gap_and_run_events_are_stored_once",),
    ),
    Mutation(
        name="compacted-history-is-not-said",
        promise="R11",
        file="control_service/app/jobs.py",
        snippet="if newest and after_sequence < oldest - 1:",
        replacement="if False:",
        tests=(f"{_COMPACTION}test_a_log_that_is_old_enough_keeps_its_last_event_only",),
    ),
    Mutation(
        name="a-crowd-is-woken-without-a-pace",
        promise="R13",
        file="control_service/app/pacing.py",
        snippet="            self._next_seconds += share * pause",
        replacement="            self._next_seconds += 0.0 * share * pause",
        tests=(f"{_PACING}test_a_crowd_is_not_woken_at_once",),
    ),
    Mutation(
        name="a-crowd-is-woken-in-one-turn",
        promise="R13",
        file="control_service/app/pacing.py",
        snippet="_WOKEN_TOGETHER = 8",
        replacement="_WOKEN_TOGETHER = 8_000_000",
        tests=(f"{_PACING}test_others_have_the_loop_between_the_turns_of_a_crowd",),
    ),
    Mutation(
        name="a-watch-passes-over-a-gap",
        promise="R11",
        file="control_service/app/event_hub.py",
        snippet="if not events or events[0].sequence != after_sequence + 1:",
        replacement="if not events:",
        tests=(f"{_COMPACTION}test_a_watcher_in_the_middle_of_history_is_told_and_gets_no_gap",),
    ),
    Mutation(
        name="logs-of-live-jobs-are-compacted",
        promise="R11",
        file="control_service/adapters/sql/job_repositories.py",
        snippet=".where(table.c.state.not_in(_LIVE), table.c.end_time < ended_before, has_more)",
        replacement=".where(has_more)",
        tests=(f"{_COMPACTION}test_a_young_log_and_a_live_one_stay_whole",),
    ),
)

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

BYTES = (
    Mutation(
        name="a-blob-is-renamed-unsynced",
        promise="R1",
        file="control_service/adapters/blobs/disk.py",
        snippet="os.fsync(self._file.fileno())",
        replacement="pass",
        tests=(f"{_DURABLE}test_a_blob_of_control",),
    ),
    Mutation(
        name="a-blobs-name-is-not-synced",
        promise="R1",
        file="control_service/adapters/blobs/disk.py",
        snippet="fsync_directory(target.parent)",
        replacement="fsync_directory(self._directory)",
        tests=(f"{_DURABLE}test_a_blob_of_control",),
    ),
    Mutation(
        name="a-new-directory-of-blobs-is-not-synced",
        promise="R1",
        file="control_service/adapters/blobs/disk.py",
        snippet="fsync_directory(self._directory)",
        replacement="fsync_directory(target.parent)",
        tests=(f"{_DURABLE}test_a_blob_of_control",),
    ),
    Mutation(
        name="an-outputs-place-is-not-synced",
        promise="R7",
        file="control_service/adapters/blobs/output.py",
        snippet="dst_dir_fd=parent)\n            os.fsync(parent)",
        replacement="dst_dir_fd=parent)\n            pass",
        tests=(f"{_DURABLE}test_an_output",),
    ),
    Mutation(
        name="a-copied-output-is-not-synced",
        promise="R7",
        file="control_service/adapters/blobs/output.py",
        snippet="os.fsync(writer.fileno())",
        replacement="pass",
        tests=(f"{_DURABLE}test_an_output",),
    ),
    Mutation(
        name="a-copied-output-is-not-compared",
        promise="R19",
        file="control_service/adapters/blobs/output.py",
        snippet="if digest.hexdigest() != sha256:",
        replacement="if False:",
        tests=(f"{_BLOBS}test_an_output_is_copied_and_verified_where_links_cannot_be",),
    ),
    Mutation(
        name="bytes-of-a-node-are-believed",
        promise="R19",
        file="control_service/app/fetch.py",
        snippet="if staged.sha256 != file.sha256 or staged.size_bytes != file.size_bytes:",
        replacement="if False:",
        tests=(f"{_RECOVERY}test_artifacts_that_cannot_be_had_fail_the_job_typed",),
    ),
    Mutation(
        name="a-job-succeeds-before-its-bytes-are-here",
        promise="R7",
        file="control_service/app/collector.py",
        snippet="await fetch_files(client, self._blobs, fact.files)",
        replacement="pass",
        tests=("tests/integration/control_core/test_job_path.py::test_a_job_runs_to_its_collected_artifacts",),
    ),
    Mutation(
        name="an-output-is-deleted-after-its-record",
        promise="R1",
        file="control_service/app/jobs.py",
        snippet="        await blobs.remove_output(path=output_path)\n"
        "    await free_unnamed(await store.transact(work), store=store, blobs=blobs)",
        replacement="        pass\n"
        "    await free_unnamed(await store.transact(work), store=store, blobs=blobs)\n"
        "    await blobs.remove_output(path=output_path or 'x')",
        tests=(f"{_STOPPING}test_a_delete_that_could_not_free_the_output_can_be_done_again",),
    ),
    Mutation(
        name="bytes-that-records-name-are-freed",
        promise="R1",
        file="control_service/app/content.py",
        snippet="[s for s in sha256s if not tx.datasets.content_is_used(s)]",
        replacement="list(sha256s)",
        tests=(f"{_KEPT}test_bytes_that_two_jobs_have_go_with_the_second",),
    ),
    Mutation(
        name="a-backup-calls-itself-finished-all-the-time",
        promise="R1",
        file="control_service/backup.py",
        snippet="    _fsync(staged)\n    staged.rename(path)",
        replacement="    staged.rename(path)",
        tests=(f"{_DURABLE}test_the_summary_of_a_backup",),
    ),
)

CONTROL = (*STORE, *LOG, *JOBS, *BYTES)
