"""What callers, nodes and operators notice of a control service that stops, drifts, or has no room."""

from __future__ import annotations

from tests.faults.mutations.mutation import Mutation

_CLIENT = "tests/unit/client/test_retry_and_cursor.py::"
_MONITOR = "tests/integration/control_core/test_node_monitor.py::"
_FULL = "tests/integration/control_core/test_full_disk.py::"
_BACKUP = "tests/integration/control/test_backup.py::"

SERVICE = (
    Mutation(
        name="a-stop-does-not-hang-up",
        promise="R26",
        file="control_service/bootstrap.py",
        snippet='        port = int(self.address.rpartition(":")[2])\n',
        replacement="        port = 0\n",
        tests=(
            "tests/integration/control/test_process.py::"
            "test_bare_calls_that_meet_a_stop_are_told_to_call_again_and_nothing_else",
        ),
    ),
    Mutation(
        name="a-call-is-given-up-before-its-deadline",
        promise="R26",
        file="clients/python/tunesmith_client/_config.py",
        snippet="max_attempts: int | None = None",
        replacement="max_attempts: int | None = 10",
        tests=(f"{_CLIENT}test_a_call_is_made_again_up_to_its_deadline_however_often_that_is",),
    ),
    Mutation(
        name="a-call-that-a-stop-cut-short-is-not-made-again",
        promise="R26",
        file="clients/python/tunesmith_client/_retry.py",
        snippet="if isinstance(error, CallCancelled) else error",
        replacement="if False else error",
        tests=(
            f"{_CLIENT}test_a_cancellation_that_nobody_here_asked_for_is_a_lost_service",
            "tests/integration/client/test_client_calls.py::test_a_call_that_a_stopped_server_cut_short_is_made_again",
        ),
    ),
    Mutation(
        name="a-node-that-speaks-is-silent-until-it-is-known",
        promise="R6",
        file="control_service/app/node_monitor.py",
        snippet="                    self._renew(name)\n                    if report",
        replacement="                    if report",
        tests=(f"{_MONITOR}test_a_new_server_that_speaks_is_not_silent_while_it_is_asked_what_it_can_do",),
    ),
    Mutation(
        name="a-job-whose-node-is-back-goes-elsewhere",
        promise="R4",
        file="control_service/domain/queue_policy.py",
        snippet="if any(view.node.name == lost_node and not view.is_lost for view in nodes):",
        replacement="if False:",
        tests=(
            "tests/unit/control/test_queue_policy.py::"
            "test_a_job_whose_node_is_back_before_it_was_given_away_stays_there",
        ),
    ),
    Mutation(
        name="a-node-that-was-heard-is-called-unreachable",
        promise="R4",
        file="control_service/app/keeper.py",
        snippet="if unreachable and view is not None and view.state is not NodeState.UNREACHABLE:",
        replacement="if False:",
        tests=(f"{_MONITOR}test_a_job_is_not_called_unreachable_once_its_node_was_heard_again",),
    ),
    Mutation(
        name="a-lease-has-one-heartbeat",
        promise="R23",
        file="control_service/app/node_monitor.py",
        snippet="_MIN_HEARTBEATS_OF_A_LEASE = 5",
        replacement="_MIN_HEARTBEATS_OF_A_LEASE = 1",
        tests=("tests/faults/test_simulation.py::test_whatever_happens_every_invariant_holds",),
    ),
    Mutation(
        name="artifacts-are-waited-for-on-a-lost-node",
        promise="R4",
        file="control_service/app/queue.py",
        snippet="return any(checkpoint.status is CheckpointStatus.REPLICATED for checkpoint in checkpoints)",
        replacement="return False",
        tests=(
            "tests/integration/control_core/test_recovery.py::"
            "test_a_job_whose_artifacts_are_lost_with_their_node_goes_on_from_its_last_checkpoint",
        ),
    ),
    Mutation(
        name="a-store-without-room-is-ready",
        promise="R21",
        file="control_service/api/health.py",
        snippet="await self._store.check_room()",
        replacement="pass",
        tests=("tests/integration/control/test_edge.py::test_a_store_without_room_is_not_ready_until_it_has_some",),
    ),
    Mutation(
        name="a-copy-without-room-is-not-made-again",
        promise="R21",
        file="control_service/app/replication.py",
        snippet="self._wanted = self._wanted or job",
        replacement="pass",
        tests=(f"{_FULL}test_a_checkpoint_that_control_has_no_room_for_is_said_once_and_copied_when_there_is_room",),
    ),
    Mutation(
        name="a-copy-without-room-is-waited-for",
        promise="R21",
        file="control_service/app/replication.py",
        snippet="        self._leaves.set()\n",
        replacement="",
        tests=(f"{_FULL}test_a_job_leaves_its_node_although_control_has_no_room_for_its_checkpoint",),
    ),
    Mutation(
        name="a-job-that-stays-after-all-is-as-one-that-leaves",
        promise="R4",
        file="control_service/app/replication.py",
        snippet="            self._leaves.clear()",
        replacement="            pass",
        tests=(
            "tests/unit/control/test_replication.py::test_a_job_that_stays_after_all_has_its_next_checkpoint_copied",
        ),
    ),
    Mutation(
        name="an-unknown-error-ends-the-writer",
        promise="R22",
        file="control_service/adapters/sql/store.py",
        snippet="        except Exception as error:  # noqa: BLE001 - a thread's boundary",
        replacement="        except sa.exc.SQLAlchemyError as error:  # a thread's boundary",
        tests=("tests/contract/control/test_store_trouble.py::test_whatever_a_commit_meets_the_writer_goes_on",),
    ),
    Mutation(
        name="a-backup-that-failed-stays",
        promise="R21",
        file="control_service/backup.py",
        snippet='    """Deletes what a backup that could not be made has written, and nothing of a finished one."""\n',
        replacement="    return\n",
        tests=(f"{_BACKUP}test_a_backup_that_cannot_be_made_leaves_what_was_there",),
    ),
)
