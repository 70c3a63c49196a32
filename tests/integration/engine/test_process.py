"""The real engine process over a socket pair: starting, keeping its base, stopping, resuming, ending."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_service.engine.control import ControlPipe
from gpu_service.engine.service import EXIT_AFTER_FAILURE, serve
from gpu_service.shim.stacks import STACKS_SIGNAL
from tests.fakes.engine_process import EngineProcess
from tests.fakes.engine_runs import Workspace, read_log
from tests.fakes.gpu_runs import wait_for
from tests.fakes.tiny_models import TinyOptions
from tunesmith.common.v1 import errors_pb2, event_pb2

pytestmark = pytest.mark.timeout(240)

# Long enough to be stopped in the middle, whatever the machine does.
_LONG: dict[str, Any] = {"num_steps": 100_000, "save_every_steps": 0}
_RESUMED_STEPS = 12
_SAVED_EVERY_STEPS = 5


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], EngineProcess]]:
    """Starts engines, and ends them all after the module's last test."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(EngineProcess(tmp_path_factory.mktemp("engine") / "engine.log"))


@pytest.fixture(scope="module")
def both(engines: Callable[[], EngineProcess]) -> tuple[EngineProcess, EngineProcess]:
    """Two engines, the first ready; the second imports what it needs while the first is tested."""
    first = engines()
    first.wait_ready()
    return first, engines()


@pytest.fixture(scope="module")
def engine(both: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    """One engine for every test that leaves it fit for the next."""
    return both[0]


@pytest.fixture(scope="module")
def restarted(both: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    """Another process, for what must survive the first."""
    both[1].wait_ready()
    return both[1]


def _wait_for_step(engine: EngineProcess, directory: Path, step: int) -> None:
    # TRAINING is told before the first step; each notice of the journal from then on is worth a look.
    engine.wait_phase(directory, "TRAINING")
    engine.wait_for(
        lambda notice: (
            notice["type"] == "journal"
            and notice["run_directory"] == str(directory)
            and notice["run_sequence"] > step
            and any(event.step >= step for event in read_log(directory).of("step"))
        )
    )


def test_base_stays_for_the_next_run(engine: EngineProcess, workspace: Workspace) -> None:
    first, second = workspace.make_run("first"), workspace.make_run("second", hyperparameters={"lora": {"rank": 8}})
    other = workspace.make_run("other", options=TinyOptions(family="qwen3"))
    finished = [engine.run(directory) for directory in (first, second, other)]

    assert [notice["state"] for notice in finished] == ["SUCCEEDED"] * 3
    assert finished[0]["resident"] == finished[1]["resident"]
    assert finished[0]["resident"]["base_model"] == "tiny/llama"
    assert finished[0]["resident"]["quantization"] == "nf4"
    assert finished[0]["resident"]["bytes"] > 0
    assert finished[2]["resident"]["base_model"] == "tiny/qwen3"
    logs = [read_log(directory) for directory in (first, second, other)]
    assert ["resident" in log.stage_details("WEIGHTS") for log in logs] == [False, True, False]
    assert ["resident" in log.stage_details("QUANTIZATION") for log in logs] == [False, True, False]
    # The adapter came off without a trace: the second run's base is the first's.
    before = [log.of("evaluation")[0].loss for log in logs[:2]]
    assert before[0] == before[1]
    # The same weights under another config are another base.
    config_path = workspace.models_directory / "tiny/qwen3/config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"rms_norm_eps": 0.1}), encoding="utf-8")
    changed = workspace.make_run("changed", options=TinyOptions(family="qwen3"))
    finished.append(engine.run(changed))
    logs.append(read_log(changed))
    assert "resident" not in logs[3].stage_details("WEIGHTS")
    assert logs[3].of("evaluation")[0].loss != logs[2].of("evaluation")[0].loss
    for log, notice in zip(logs, finished, strict=True):
        (released,) = log.of("memory_released")
        assert released.resident_bytes == notice["resident"]["bytes"]
        assert not released.engine_ended


def test_full_training_leaves_nothing(engine: EngineProcess, workspace: Workspace) -> None:
    directory = workspace.make_run("nothing-left", training_type="full")
    assert engine.run(directory)["resident"] == {}
    assert read_log(directory).of("memory_released")[0].resident_bytes == 0


def test_notices_follow_the_journal(engine: EngineProcess, workspace: Workspace) -> None:
    directory = workspace.make_run("notices")
    engine.run(directory)

    ours = [notice for notice in engine.notices if notice.get("run_directory") == str(directory)]
    sequences = [notice["run_sequence"] for notice in ours if notice["type"] == "journal"]
    assert sequences == list(range(1, len(read_log(directory).payloads) + 1))
    phases = [notice["phase"] for notice in ours if notice["type"] == "phase"]
    assert phases == read_log(directory).phases


def test_refused_plan_leaves_the_engine_fit(engine: EngineProcess, workspace: Workspace) -> None:
    directory = workspace.make_run("refused", hyperparameters={"lora": {"target_modules": ["no_such_layer"]}})
    assert engine.run(directory)["state"] == "FAILED"

    failure = read_log(directory).of("run_state")[-1].failure
    assert failure.reason == errors_pb2.ERROR_REASON_TARGETS_MATCH_NOTHING
    assert failure.fault == errors_pb2.FAULT_USER
    assert engine.run(workspace.make_run("after-refusal"))["state"] == "SUCCEEDED"


def test_cancel_while_training(engine: EngineProcess, workspace: Workspace) -> None:
    directory = workspace.make_run("cancelled", hyperparameters=_LONG)
    engine.send(type="start_run", run_directory=str(directory))
    _wait_for_step(engine, directory, 2)
    engine.send(type="stop_run", run_directory=str(directory), mode="cancel", grace_seconds=30)

    assert engine.wait_finished(directory)["state"] == "CANCELLED"
    log = read_log(directory)
    assert log.states == ["RUNNING", "STOPPING", "CANCELLED"]
    assert [payload.WhichOneof("kind") for payload in log.payloads][-2:] == ["memory_released", "run_state"]
    assert not log.of("checkpoint")
    # The engine is still warm, and its base clean.
    assert engine.run(workspace.make_run("after-cancel"))["state"] == "SUCCEEDED"


@pytest.mark.parametrize("phase", ["PLANNING", "LOADING", "EVALUATING"])
def test_cancel_before_training(phase: str, engine: EngineProcess, workspace: Workspace) -> None:
    """A stop is honored wherever it meets the run; it may come a little later than the phase that was waited for."""
    directory = workspace.make_run(f"cancelled-{phase}", hyperparameters=_LONG)
    engine.send(type="start_run", run_directory=str(directory))
    engine.wait_phase(directory, phase)
    engine.send(type="stop_run", run_directory=str(directory), mode="cancel", grace_seconds=30)

    assert engine.wait_finished(directory)["state"] == "CANCELLED"
    log = read_log(directory)
    assert log.states == ["RUNNING", "STOPPING", "CANCELLED"]
    assert len(log.of("memory_released")) == 1
    # But for the planner that waits for the next run, which is begun just now.
    wait_for(lambda: all("--wait" in child.cmdline() for child in psutil.Process(engine.process.pid).children()))


def test_stop_that_comes_before_its_run(engine: EngineProcess, workspace: Workspace) -> None:
    directory = workspace.make_run("early", hyperparameters=_LONG)
    engine.send(type="stop_run", run_directory=str(directory), mode="cancel", grace_seconds=30)
    engine.send(type="start_run", run_directory=str(directory))

    assert engine.wait_finished(directory)["state"] == "CANCELLED"


def test_stacks_are_told_when_asked_for_and_harm_nothing(engine: EngineProcess, workspace: Workspace) -> None:
    """By a handler in C, which a shim asks before it ends an engine that hangs."""
    directory = workspace.make_run("stacks", hyperparameters=_LONG)
    engine.send(type="start_run", run_directory=str(directory))
    _wait_for_step(engine, directory, 1)
    engine.process.send_signal(STACKS_SIGNAL)
    _wait_for_step(engine, directory, 3)
    engine.send(type="stop_run", run_directory=str(directory), mode="cancel", grace_seconds=30)
    engine.wait_finished(directory)
    assert "training/loop.py" in engine.log_path.read_text(errors="replace")
    # And what is progress is told of as it is made.
    assert any(notice["type"] == "alive" for notice in engine.notices)


def test_a_line_that_is_no_command_is_passed_over(engine: EngineProcess, workspace: Workspace) -> None:
    engine.send(type="dance")
    engine.send(nonsense=1)
    assert engine.run(workspace.make_run("after-nonsense"))["state"] == "SUCCEEDED"


@pytest.mark.parametrize("training_type", ["qlora", "lora", "full"])
def test_resumed_training_equals_the_uninterrupted(
    training_type: str, engine: EngineProcess, restarted: EngineProcess, workspace: Workspace
) -> None:
    """Interrupted in one engine and resumed in another, losses and what was trained are the same to the last bit."""
    hyperparameters: dict[str, Any] = {
        "num_steps": _RESUMED_STEPS,
        "save_every_steps": _SAVED_EVERY_STEPS,
        "keep_checkpoints": 3,
        "optimizer": {"learning_rate": 5e-3},
    }
    if training_type != "full":
        # Dropout draws from the generator whose state is kept.
        hyperparameters["lora"] = {"rank": 4, "dropout": 0.2}
    whole = workspace.make_run(f"{training_type}-whole", training_type=training_type, hyperparameters=hyperparameters)
    assert engine.run(whole)["state"] == "SUCCEEDED"
    uninterrupted = read_log(whole)
    epoch = uninterrupted.of("plan")[0].examples_per_epoch // 4
    # In the middle of the first epoch, and of the second.
    assert _SAVED_EVERY_STEPS < epoch < 2 * _SAVED_EVERY_STEPS < _RESUMED_STEPS < 2 * epoch

    for attempt, step in enumerate((_SAVED_EVERY_STEPS, 2 * _SAVED_EVERY_STEPS), start=2):
        rest = workspace.make_run(
            f"{training_type}-rest",
            training_type=training_type,
            hyperparameters=hyperparameters,
            attempt=attempt,
            resume=workspace.resume_point(whole, step),
        )
        assert restarted.run(rest)["state"] == "SUCCEEDED"
        resumed = read_log(rest)

        (event,) = resumed.of("resumed")
        assert (event.from_step, event.checkpoint) == (step, f"step-{step:08d}")
        saved = next(event for event in uninterrupted.of("checkpoint") if event.step == step)
        assert event.measured_probe_loss == event.saved_probe_loss == saved.probe_loss > 0
        assert resumed.losses == {n: loss for n, loss in uninterrupted.losses.items() if n > step}
        assert resumed.of("evaluation")[-1].loss == uninterrupted.of("evaluation")[-1].loss
        assert _trained_weights(rest) == _trained_weights(whole)
        # What came before the interruption is in the report and in the realized counts.
        assert resumed.of("realized")[0].total_tokens == uninterrupted.of("realized")[0].total_tokens
        metrics = json.loads((rest / "artifacts/report/metrics.json").read_text())
        assert [entry["step"] for entry in metrics["steps"]] == list(range(1, _RESUMED_STEPS + 1))
        assert [evaluation["moment"] for evaluation in metrics["evaluations"]] == ["BASE", "FINAL"]


def _trained_weights(run_directory: Path) -> bytes:
    (path,) = (run_directory / "artifacts").glob("*/*.safetensors")
    return path.read_bytes()


def test_damaged_checkpoint_is_refused(workspace: Workspace) -> None:
    """A failed run ends its engine: here the serving loop of one in this process, which says with what status."""
    whole = workspace.make_run("damaged", hyperparameters={"num_steps": 2})
    # What the loop does after the first run is at hand when it asks, so the damage is done in between.
    path = whole / "checkpoints/step-00000002/weights.safetensors"
    linked = workspace.root / "linked" / path.parent.name
    resume = {
        "checkpoint_directory": str(linked),
        "checkpoint": path.parent.name,
        "step": 2,
        "source_directory": str(path.parent),
    }
    again = workspace.make_run("damaged", hyperparameters={"num_steps": 2}, attempt=2, resume=resume)
    notices: list[dict[str, Any]] = []
    runs = iter((whole, again))

    class Pipe(ControlPipe):
        def next_order(self) -> Path | None:
            return next(runs)

        def clear(self, run_directory: Path) -> bool:
            """The run leaves nothing."""
            return True

        def notify(self, notice: dict[str, Any]) -> None:
            notices.append(notice)
            if notice["type"] == "run_finished" and notice["run_directory"] == str(whole):
                damaged = bytearray(path.read_bytes())
                damaged[-1] ^= 1
                path.write_bytes(damaged)
                shutil.copytree(path.parent, linked)

    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert serve(Pipe(theirs)) == EXIT_AFTER_FAILURE

    assert notices[-1] == {"type": "run_finished", "run_directory": str(again), "state": "FAILED", "resident": {}}
    failure = read_log(again).of("run_state")[-1].failure
    assert failure.reason == errors_pb2.ERROR_REASON_RESUME_MISMATCH
    # By which control knows that another copy may do.
    assert (failure.fault, failure.details["checkpoint"]) == (errors_pb2.FAULT_HARDWARE, "step-00000002")
    assert failure.file == "checkpoints/step-00000002/weights.safetensors"
    assert read_log(again).of("memory_released")[0].engine_ended
    # Nobody takes it for whole again, and the log says where it is.
    assert [one.name for one in path.parent.parent.iterdir()] == [".damaged-step-00000002"]
    (warning,) = read_log(again).of("warning")
    assert warning.code == "checkpoint-damaged"
    assert "weights.safetensors" in warning.message
    assert ".damaged-step-00000002" in warning.message


def test_checkpoint_stop_interrupts_and_can_be_resumed(workspace: Workspace, engine: EngineProcess) -> None:
    directory = workspace.make_run("interrupted", hyperparameters=_LONG)
    engine.send(type="start_run", run_directory=str(directory))
    _wait_for_step(engine, directory, 2)
    engine.send(type="stop_run", run_directory=str(directory), mode="checkpoint", grace_seconds=30)

    assert engine.wait_finished(directory)["state"] == "INTERRUPTED"
    log = read_log(directory)
    assert log.states == ["RUNNING", "STOPPING", "INTERRUPTED"]
    (checkpoint,) = log.of("checkpoint")
    assert checkpoint.step == log.of("step")[-1].step
    assert "manifest.json" in {file.path for file in checkpoint.files}


def _assert_interrupted_at_a_checkpoint(directory: Path) -> None:
    log = read_log(directory)
    assert log.states == ["RUNNING", "STOPPING", "INTERRUPTED"]
    assert log.of("checkpoint")[-1].status == event_pb2.CHECKPOINT_STATUS_COMMITTED


def test_sigterm_saves_the_run_and_ends_the_engine(workspace: Workspace, engine: EngineProcess) -> None:
    """The last test of the module's engine."""
    directory = workspace.make_run("terminated", hyperparameters=_LONG)
    engine.send(type="start_run", run_directory=str(directory))
    _wait_for_step(engine, directory, 1)
    engine.terminate()

    assert engine.wait_exit() == 0
    _assert_interrupted_at_a_checkpoint(directory)


def test_death_of_the_shim_saves_the_run_and_ends_the_engine(workspace: Workspace, restarted: EngineProcess) -> None:
    """The last test of the other engine."""
    directory = workspace.make_run("orphaned", hyperparameters=_LONG)
    restarted.send(type="start_run", run_directory=str(directory))
    _wait_for_step(restarted, directory, 1)
    restarted.close()
    assert restarted.wait_exit() == 0
    _assert_interrupted_at_a_checkpoint(directory)
