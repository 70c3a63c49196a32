"""What a node's runs hang on: fences of attempts, stops, outcomes, and who is alive."""

from __future__ import annotations

from tests.faults.mutations.mutation import Mutation

_FENCES = "tests/unit/gpu_server/test_fences.py::"
_KILLS = "tests/faults/test_gpu_kills.py::"
_RUNS = "tests/integration/gpu_server/test_runs.py::"
_SHIM = "tests/integration/gpu_server/test_shim.py::"
_SHIM_PARTS = "tests/unit/gpu_server/test_shim_parts.py::"

RUNS = (
    Mutation(
        name="an-older-attempt-is-accepted",
        promise="R3",
        file="gpu_service/domain/fencing.py",
        snippet="if attempt <= highest_attempt:",
        replacement="if attempt == highest_attempt:",
        tests=("tests/unit/gpu_server/test_domain.py::test_fencing",),
    ),
    Mutation(
        name="a-released-attempt-is-accepted-again",
        promise="R3",
        file="gpu_service/domain/fencing.py",
        snippet="if attempt <= highest_attempt:",
        replacement="if attempt < highest_attempt:",
        tests=(
            "tests/unit/gpu_server/test_domain.py::test_fencing",
            f"{_RUNS}test_the_epoch_survives_restart_and_release",
        ),
    ),
    Mutation(
        name="another-spec-is-the-same-attempt",
        promise="R2",
        file="gpu_service/domain/fencing.py",
        snippet="if known_digest == spec_digest:",
        replacement="if True:",
        tests=("tests/unit/gpu_server/test_domain.py::test_fencing",),
    ),
    Mutation(
        name="a-node-works-for-two-installations",
        promise="R3",
        file="gpu_service/runs/manager.py",
        snippet='if self._facts.installation_id not in ("", ',
        replacement='if "" not in ("", ',
        tests=(f"{_RUNS}test_start_is_idempotent_and_fenced",),
    ),
    Mutation(
        name="the-epoch-is-only-in-memory",
        promise="R3",
        file="gpu_service/runs/manager.py",
        snippet="        await asyncio.to_thread(self._files.write_facts, facts)",
        replacement="        pass",
        tests=(f"{_RUNS}test_the_epoch_survives_restart_and_release",),
    ),
    Mutation(
        name="the-epoch-of-a-run-alone-is-not-learned",
        promise="R3",
        file="gpu_service/runs/manager.py",
        snippet="if run.key.attempt > highest:",
        replacement="if False:",
        tests=("tests/unit/gpu_server/test_manager.py::test_an_attempt_that_only_its_run_knows_is_fenced_for_good",),
    ),
    Mutation(
        name="a-live-run-is-released",
        promise="R3",
        file="gpu_service/runs/manager.py",
        snippet='        if not run.is_over:\n            raise Refusal("JOB_STATE"',
        replacement='        if False:\n            raise Refusal("JOB_STATE"',
        tests=(f"{_RUNS}test_start_is_idempotent_and_fenced",),
    ),
    Mutation(
        name="an-older-attempt-is-not-stopped",
        promise="R3",
        file="gpu_service/runs/launcher.py",
        snippet='await self.stop(other, "cancel", self._grace_seconds)',
        replacement="pass",
        tests=(f"{_RUNS}test_start_is_idempotent_and_fenced",),
    ),
    Mutation(
        name="a-cancel-is-taken-back",
        promise="R14",
        file="gpu_service/runs/run.py",
        snippet='if self.stop_mode != "cancel":',
        replacement="if True:",
        tests=(f"{_FENCES}test_a_cancel_is_never_taken_back",),
    ),
    Mutation(
        name="a-stop-is-loosened",
        promise="R14",
        file="gpu_service/shim/stop.py",
        snippet="self.deadline = min(self.deadline, time.monotonic() + grace_seconds)",
        replacement="self.deadline = time.monotonic() + grace_seconds",
        tests=(f"{_SHIM_PARTS}test_a_stop_is_only_ever_tightened",),
    ),
    Mutation(
        name="a-checkpoint-outranks-a-cancel",
        promise="R14",
        file="gpu_service/engine/stopping.py",
        snippet="if self._mode is not StopMode.CANCEL:",
        replacement="if True:",
        tests=("tests/unit/engine/test_stopping.py::test_cancel_outranks_checkpoint",),
    ),
    Mutation(
        name="an-outcome-is-overwritten",
        promise="R7",
        file="gpu_service/shim/closing.py",
        snippet="if summary.is_over:",
        replacement="if False:",
        tests=(f"{_SHIM_PARTS}test_an_engines_end_becomes_one_terminal_event",),
    ),
    Mutation(
        name="an-exit-record-is-overwritten",
        promise="R7",
        file="gpu_service/shim/bury.py",
        snippet="if ending is None:",
        replacement="if True:",
        tests=(f"{_FENCES}test_what_a_shim_recorded_is_how_its_engine_ended",),
    ),
    Mutation(
        name="a-twin-may-have-the-lock",
        promise="R31",
        file="gpu_service/shim/lock.py",
        snippet="            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "        except BlockingIOError:\n            raise",
        replacement="            pass\n        except BlockingIOError:\n            raise",
        tests=(f"{_SHIM_PARTS}test_a_lock_is_held_by_one_and_freed_at_the_end",),
    ),
    Mutation(
        name="nobody-looks-whether-a-shim-lives",
        promise="R6",
        file="gpu_service/shim/lock.py",
        snippet="        return True\n    finally:",
        replacement="        return False\n    finally:",
        tests=(f"{_SHIM_PARTS}test_a_lock_is_held_by_one_and_freed_at_the_end",),
    ),
    Mutation(
        name="a-slow-phase-hides-a-hang",
        promise="R17",
        file="gpu_service/shim/hang_clock.py",
        snippet="min(_TIMES_LONGEST_PAUSE * self._longest_pause, _MOST_TIMES_LIMIT * self._limit_seconds)",
        replacement="_TIMES_LONGEST_PAUSE * self._longest_pause",
        tests=("tests/unit/gpu_server/test_hang_clock.py::test_however_slow_a_phase_was_its_limit_is_bounded",),
    ),
    Mutation(
        name="an-engine-without-room-is-lost",
        promise="R21",
        file="gpu_service/runs/engine_directories.py",
        snippet="disk_full=exit_status == EXIT_DISK_FULL",
        replacement="disk_full=False",
        tests=(
            "tests/integration/gpu_server/test_engine_pool.py::test_an_engine_that_finds_no_room_for_its_files_is_named",
        ),
    ),
    Mutation(
        name="a-starved-planner-is-a-defect",
        promise="R18",
        file="gpu_service/engine/planning.py",
        snippet="out_of_memory and code == -signal.SIGKILL",
        replacement="False",
        tests=("tests/unit/engine/test_planning.py::test_a_planner_that_the_kernel_killed_for_memory_is_named",),
    ),
    Mutation(
        name="a-machine-that-stood-still-hangs",
        promise="R17",
        file="gpu_service/shim/hang_clock.py",
        snippet="now - self._slept_from",
        replacement="late_seconds",
        tests=(
            "tests/unit/gpu_server/test_hang_clock.py::"
            "test_a_machine_that_stood_still_beyond_the_deadline_gives_the_engine_time_to_go_on",
        ),
    ),
    Mutation(
        name="half-of-what-was-not-accepted-is-a-run",
        promise="R1",
        file="gpu_service/runs/node_files.py",
        snippet="        durable_json.sync_directory(directory)\n        shutil",
        replacement="        shutil",
        tests=(
            "tests/unit/gpu_server/test_node.py::"
            "test_what_is_not_accepted_is_no_run_any_more_before_anything_else_of_it_goes",
        ),
    ),
    Mutation(
        name="a-cancel-is-said-while-processes-may-live",
        promise="R14",
        file="gpu_service/engine/service.py",
        snippet="if not clear(run_directory) and outcome.state",
        replacement="if clear(run_directory) is None and outcome.state",
        tests=("tests/integration/engine/test_cancel_memory.py::test_what_nobody_could_clear_is_not_called_cancelled",),
    ),
    Mutation(
        name="a-twin-may-have-the-nodes-port",
        promise="R31",
        file="gpu_service/api/server_options.py",
        snippet='("grpc.so_reuseport", 0),',
        replacement='("grpc.so_reuseport", 1),',
        tests=(f"{_KILLS}test_a_twin_refuses_to_start_and_leaves_the_first_unharmed",),
    ),
    Mutation(
        name="an-engine-has-a-run-that-no-record-names",
        promise="R4",
        file="gpu_service/shim/loop.py",
        snippet='        self._write_record()\n        failpoint("shim.before-forward")',
        replacement='        failpoint("shim.before-forward")',
        tests=(f"{_SHIM}test_a_lost_shim_is_buried",),
    ),
    Mutation(
        name="a-shim-inherits-no-orphans",
        promise="R14",
        file="gpu_service/shim/process_tree.py",
        snippet="libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)",
        replacement="libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)",
        tests=(f"{_SHIM}test_cancel_is_said_only_when_a_frozen_engine_and_its_detached_child_are_gone",),
    ),
    Mutation(
        name="a-successor-knows-no-runs",
        promise="R6",
        file="gpu_service/runs/manager.py",
        snippet="await self._pool.adopt({str(run.directory): run for run in self._runs.values()})",
        replacement="await self._pool.adopt({})",
        tests=(f"{_KILLS}test_the_servers_death_does_not_stop_training_and_its_successor_adopts",),
    ),
)
