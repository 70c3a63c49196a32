"""What control's promises hang on in its store and in the log of jobs."""

from __future__ import annotations

from tests.faults.mutations.mutation import Mutation

_STORE = "tests/contract/control/test_store.py::"
_PACING = "tests/unit/control/test_pacing.py::"
_RECOVERY = "tests/integration/control_core/test_recovery.py::"
_REQUESTS = "tests/integration/control_core/test_requests.py::"
_COMPACTION = "tests/integration/control_core/test_compaction.py::"
_FENCES = "tests/contract/control/test_fences.py::"

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
        name="a-log-that-cannot-be-shown-stops-all",
        promise="R13",
        file="control_service/app/pacing.py",
        snippet="        finally:\n            # Behind those",
        replacement="        except ZeroDivisionError:\n            raise\n        else:\n            # Behind those",
        tests=(f"{_PACING}test_a_room_that_cannot_show_what_came_stops_nobody",),
    ),
    Mutation(
        name="large-events-are-gathered-without-end",
        promise="R5",
        file="control_service/app/gathering.py",
        snippet=" or self._size_bytes >= MAX_BYTES",
        replacement="",
        tests=("tests/unit/control/test_gathering.py::test_large_events_wait_in_the_stream_and_not_in_memory",),
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
