"""RunService over a real socket: start, watch, stop, fence, release."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import grpc
import pytest

from tests.fakes.gpu_runs import WAIT_SECONDS
from tests.fakes.gpu_server import INSTALLATION, GpuServer, error_info
from tunesmith.common.v1 import event_pb2, plan_pb2
from tunesmith.gpu.v1 import run_service_pb2

SUCCEEDED, CANCELLED = event_pb2.RUN_STATE_SUCCEEDED, event_pb2.RUN_STATE_CANCELLED
INTERRUPTED = event_pb2.RUN_STATE_INTERRUPTED


def refusal(call: object) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    return error_info(caught.value)


def test_a_run_is_trained_watched_and_its_files_read(server: GpuServer) -> None:
    accepted = server.start_run(num_steps=4, save_every_steps=2)
    assert accepted.state in (event_pb2.RUN_STATE_ACCEPTED, event_pb2.RUN_STATE_RUNNING)
    events = server.watch_to_end()
    assert [payload.step.step for payload in events if payload.HasField("step")] == [1, 2, 3, 4]
    assert events[-1].run_state.state == SUCCEEDED
    assert [payload.WhichOneof("kind") for payload in events[-4:]] == [
        "artifact",
        "artifact",
        "memory_released",
        "run_state",
    ]
    run = server.get_run()
    assert (run.state, run.last_run_sequence) == (SUCCEEDED, len(events))
    assert (run.last_checkpoint, run.last_checkpoint_step) == ("step-00000004", 4)
    assert len(run.weights_digest) == 64
    adapter = next(artifact for artifact in run.artifacts if artifact.name == "adapter")
    content = server.read_blob(adapter.files[0].sha256)
    assert hashlib.sha256(content).hexdigest() == adapter.files[0].sha256
    assert server.read_blob(adapter.files[0].sha256, offset=8) == content[8:]
    checkpoint = next(payload.checkpoint for payload in events if payload.HasField("checkpoint"))
    manifest = json.loads(server.read_blob(checkpoint.manifest_sha256))
    assert server.read_blob(manifest["files"][0]["sha256"])
    # Resumed anywhere, the rest comes without gap.
    assert server.watch_to_end(after=7) == events[7:]
    assert list(server.watch(after=len(events))) == []


def test_start_is_idempotent_and_fenced(server: GpuServer, tmp_path: Path) -> None:
    hold = {"hold_at": 2, "until_file": str(tmp_path / "go")}
    server.start_run(attempt=2, script=hold)
    live = run_service_pb2.ReleaseRunRequest(key=server.key(attempt=2))
    assert refusal(lambda: server.runs.ReleaseRun(live, timeout=WAIT_SECONDS))[1] == "JOB_STATE"
    assert server.start_run(attempt=2, script=hold).key.attempt == 2
    code, reason, _ = refusal(lambda: server.start_run(attempt=2, num_steps=6))
    assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "RUN_CONFLICT")
    code, reason, details = refusal(lambda: server.start_run(attempt=1, script=hold))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH")
    assert details["highest_attempt"] == "2"
    code, reason, _ = refusal(lambda: server.start_run("01OTHER"))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY")
    foreign = server.request("01OTHER")
    foreign.key.installation_id = "installation-2"
    code, reason, _ = refusal(lambda: server.runs.StartRun(foreign, timeout=WAIT_SECONDS))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_INSTALLATION")
    watch = run_service_pb2.WatchNodeRequest(installation_id="installation-2")
    code, reason, _ = refusal(lambda: next(server.runs.WatchNode(watch, timeout=WAIT_SECONDS)))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_INSTALLATION")
    # A higher attempt stops the older first.
    server.wait_for_step(1, attempt=2)
    server.start_run(attempt=3)
    assert server.watch_to_end(attempt=2)[-1].run_state.state == CANCELLED
    assert server.watch_to_end(attempt=3)[-1].run_state.state == SUCCEEDED
    listed = server.runs.ListRuns(run_service_pb2.ListRunsRequest(installation_id=INSTALLATION), timeout=WAIT_SECONDS)
    assert [run.key.attempt for run in listed.runs] == [2, 3]


def test_a_refused_attempt_leaves_the_older_ones_device_alone(server: GpuServer, tmp_path: Path) -> None:
    go = tmp_path / "go"
    server.start_run(script={"hold_at": 2, "until_file": str(go)})
    server.wait_for_step(1)
    missing = run_service_pb2.ResumeFrom(checkpoint="step-00000009", step=9, attempt=1)
    assert refusal(lambda: server.start_run(attempt=2, resume_from=missing))[1] == "CHECKPOINT_NOT_FOUND"
    assert not server.run_directory(attempt=2).exists()
    # The first attempt goes on, so nobody else gets its device.
    assert refusal(lambda: server.start_run("01OTHER"))[1] == "NODE_BUSY"
    go.touch()
    assert server.watch_to_end()[-1].run_state.state == SUCCEEDED
    server.start_run("01OTHER")
    assert server.watch_to_end("01OTHER")[-1].run_state.state == SUCCEEDED


def test_the_epoch_survives_restart_and_release(server: GpuServer) -> None:
    server.start_run(attempt=2)
    server.watch_to_end(attempt=2)
    request = run_service_pb2.ReleaseRunRequest(key=server.key(attempt=2))
    assert server.runs.ReleaseRun(request, timeout=WAIT_SECONDS).freed_bytes > 0
    assert not server.run_directory(attempt=2).exists()
    assert server.runs.ReleaseRun(request, timeout=WAIT_SECONDS).freed_bytes == 0
    server.kill()
    server.start()
    for attempt in (1, 2):
        assert refusal(lambda attempt=attempt: server.start_run(attempt=attempt))[1] == "STALE_EPOCH"
    assert refusal(lambda: server.get_run(attempt=2))[:2] == (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")


@pytest.mark.parametrize("place", ["PLANNING", "LOADING", "TRAINING", "SAVING", 3])
def test_cancel_works_at_every_phase_and_keeps_the_engine_warm(
    server: GpuServer, tmp_path: Path, place: str | int
) -> None:
    server.start_run(script={"hold_at": place, "until_file": str(tmp_path / "never")})
    if isinstance(place, str):
        server.wait_for_phase(place)
    else:
        server.wait_for_step(place - 1)
    assert server.stop_run("CANCEL").state == event_pb2.RUN_STATE_STOPPING
    events = server.watch_to_end()
    assert events[-1].run_state.state == CANCELLED
    assert not events[-2].memory_released.engine_ended
    assert server.stop_run("CANCEL").state == CANCELLED
    [engine] = server.shims()
    server.start_run("01NEXT")
    assert server.watch_to_end("01NEXT")[-1].run_state.state == SUCCEEDED
    assert [shim["engine_pid"] for shim in server.shims()] == [engine["engine_pid"]]


def test_cancel_right_after_start_leaves_nothing(server: GpuServer) -> None:
    server.start_run(num_steps=1_000_000)
    server.stop_run("CANCEL")
    assert server.watch_to_end()[-1].run_state.state == CANCELLED


def test_cancel_of_an_engine_that_hears_nothing_ends_every_process_first(server: GpuServer) -> None:
    server.start_run(num_steps=100_000, script={"freeze_at": 3, "ignore_stop": True, "spawn_setsid_child": True})
    server.wait_for_step(2)
    assert len(server.living_processes()) >= 2
    server.stop_run("CANCEL", grace_seconds=0.2)
    events = server.watch_to_end()
    assert server.living_processes() == []
    assert events[-1].run_state.state == CANCELLED
    released = events[-2].memory_released
    assert released.engine_ended
    assert released.freed_bytes > 0
    server.start_run("01NEXT")
    assert server.watch_to_end("01NEXT")[-1].run_state.state == SUCCEEDED


def test_a_checkpoint_stop_can_be_gone_on_from(server: GpuServer) -> None:
    server.start_run(num_steps=100_000)
    server.wait_for_step(3)
    server.stop_run("CHECKPOINT")
    events = server.watch_to_end()
    assert events[-1].run_state.state == INTERRUPTED
    run = server.get_run()
    assert run.last_checkpoint
    resume = run_service_pb2.ResumeFrom(checkpoint=run.last_checkpoint, step=run.last_checkpoint_step, attempt=1)
    total = run.last_checkpoint_step + 2
    # Its files are the next attempt's own, so that the first can be released.
    server.start_run(attempt=2, num_steps=total, resume_from=resume)
    events = server.watch_to_end(attempt=2)
    resumed = next(payload.resumed for payload in events if payload.HasField("resumed"))
    assert resumed.from_step == run.last_checkpoint_step
    assert [payload.step.step for payload in events if payload.HasField("step")] == [total - 1, total]
    stale = run_service_pb2.ResumeFrom(checkpoint="step-99999999", step=1, attempt=1)
    assert refusal(lambda: server.start_run(attempt=3, resume_from=stale))[1] == "CHECKPOINT_NOT_FOUND"


def watch_node(server: GpuServer) -> object:
    request = run_service_pb2.WatchNodeRequest(installation_id=INSTALLATION, heartbeat_seconds=0.05)
    return server.runs.WatchNode(request, timeout=WAIT_SECONDS)


def test_the_node_reports_at_once_on_change_and_on_every_heartbeat(server: GpuServer) -> None:
    request = run_service_pb2.WatchNodeRequest(installation_id=INSTALLATION, heartbeat_seconds=WAIT_SECONDS * 10)
    reports = server.runs.WatchNode(request, timeout=WAIT_SECONDS)
    first = next(reports)
    assert first.accepting
    assert not first.runs
    assert first.devices[0].total_memory_bytes > 0
    server.start_run()
    states: list[event_pb2.RunState.ValueType] = []
    for report in reports:
        states.extend(run.state for run in report.runs)
        if report.runs and report.runs[0].state == SUCCEEDED and report.accepting:
            assert report.resident_base_model == "org/name"
            break
    assert states[-1] == SUCCEEDED
    beats = watch_node(server)
    assert next(beats).instance_id == next(beats).instance_id == first.instance_id  # type: ignore[call-overload]


def test_refusals_carry_reason_field_and_write_nothing(server: GpuServer) -> None:
    unknown = server.request()
    unknown.spec.base_model = "org/other"
    code, reason, details = refusal(lambda: server.runs.StartRun(unknown, timeout=WAIT_SECONDS))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_FOUND")
    assert details["available_models"] == "org/name"
    bad = server.request()
    bad.spec.training_type = "magic"
    code, reason, details = refusal(lambda: server.runs.StartRun(bad, timeout=WAIT_SECONDS))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "TRAINING_TYPE_UNKNOWN")
    assert details["field"] == "training_type"
    missing = server.request()
    missing.spec.datasets[0].sha256 = "0" * 64
    code, reason, details = refusal(lambda: server.runs.StartRun(missing, timeout=WAIT_SECONDS))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BLOB_NOT_FOUND")
    assert details["sha256"] == "0" * 64
    pinned = server.request()
    pinned.weights_digest = "1" * 64
    assert refusal(lambda: server.runs.StartRun(pinned, timeout=WAIT_SECONDS))[1] == "MODEL_NOT_FOUND"
    climbing = server.request()
    climbing.key.job_id = "../../x"
    code, reason, details = refusal(lambda: server.runs.StartRun(climbing, timeout=WAIT_SECONDS))
    assert (code, reason, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "key.job_id")
    assert list((server.data_directory / "runs").iterdir()) == []
    # The attempt was never accepted, so it can still be.
    server.start_run()
    assert server.watch_to_end()[-1].run_state.state == SUCCEEDED


def test_capabilities_and_a_checked_plan(server: GpuServer) -> None:
    found = server.runs.GetCapabilities(run_service_pb2.GetCapabilitiesRequest(), timeout=WAIT_SECONDS)
    assert found.node_name == "local"
    assert [model.name for model in found.models] == ["org/name"]
    assert len(found.models[0].weights_digest) == 64
    assert "nf4" in [entry.id for entry in found.quantizations]
    llama = next(entry for entry in found.model_types if entry.id == "llama")
    assert llama.details["config_types"] == "llama"
    # One that this node's device cannot go on with from a checkpoint is not there.
    assert [entry.id for entry in found.optimizers] == ["adamw", "adamw-8bit"]
    assert [entry.id for entry in found.exports] == ["merged"]
    assert float(found.optimizers[1].details["state_bytes_per_parameter"]) == pytest.approx(2, rel=0.02)
    assert found.versions["torch"]
    assert not found.HasField("problem")
    spec = server.request(num_steps=7).spec
    request = run_service_pb2.PlanRunRequest(spec=spec, level=plan_pb2.PLAN_LEVEL_CHECK, installation_id=INSTALLATION)
    plan = server.runs.PlanRun(request, timeout=WAIT_SECONDS).plan
    assert (plan.level, plan.num_steps) == (plan_pb2.PLAN_LEVEL_CHECK, 7)
    assert plan.weights_digest == found.models[0].weights_digest


def test_a_failure_of_the_engines_own_keeps_its_type(server: GpuServer) -> None:
    server.start_run(script={"fail_at_step": 2})
    failure = server.watch_to_end()[-1].run_state.failure
    assert failure.exception_type == "ArithmeticError"
    assert server.get_run().failure == failure
    # An engine that failed a run gets no other.
    [engine] = server.engine_directories()
    server.start_run(attempt=2)
    assert server.watch_to_end(attempt=2)[-1].run_state.state == SUCCEEDED
    assert (engine / "exit.json").exists()
    assert len(server.engine_directories()) == 2
