"""A run that a new engine is given before its libraries are imported, as the first run of a node is: real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_service.journal import Reader
from tests.fakes.engine_process import EngineProcess
from tests.fakes.engine_runs import Workspace, read_log
from tests.fakes.gpu_runs import wait_for
from tunesmith.common.v1 import errors_pb2

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def halted() -> list[psutil.Process]:
    """Planners that were halted before they got a run."""
    return []


@pytest.fixture
def start(tmp_path: Path, halted: list[psutil.Process]) -> Iterator[Callable[..., EngineProcess]]:
    """A new engine that has been sent a run, and whatever follows it, before it could be ready."""
    with ExitStack() as stack:

        def start(directory: Path, *messages: dict[str, Any], halts_planner: bool = False) -> EngineProcess:
            engine = stack.enter_context(EngineProcess(tmp_path / "engine.log", device_id="cpu:-1"))
            if halts_planner:
                # The one that waits gets the run's request, and never answers; nothing but SIGKILL ends it.
                (planner,) = wait_for(lambda: _planners(engine))
                planner.suspend()
                stack.callback(_kill, planner)
                halted.append(planner)
            for message in ({"type": "start_run"}, *messages):
                engine.send(run_directory=str(directory), **message)
            return engine

        yield start


def _planners(engine: EngineProcess) -> list[psutil.Process]:
    """Planners that the engine has, whether they wait or work."""
    children = psutil.Process(engine.process.pid).children()
    return [child for child in children if "gpu_service.planner" in child.cmdline()]


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _begun_at_seconds(directory: Path) -> float:
    """When the journal of the run began, by the engine's own clock."""
    with Reader(directory / "journal") as reader:
        (first,) = reader.read(0, limit=1)
    return float(first.decode().time.ToNanoseconds() / 1e9)


def test_it_is_planned_while_the_engine_imports(start: Callable[..., EngineProcess], workspace: Workspace) -> None:
    directory = workspace.make_run("early")
    engine = start(directory)
    assert engine.wait_finished(directory)["state"] == "SUCCEEDED"
    # Asked for before the run's first event, which the imports come before.
    assert (directory / "planner-request.json").stat().st_mtime < _begun_at_seconds(directory)
    log = read_log(directory)
    assert log.phases[:2] == ["PLANNING", "LOADING"]
    assert len(log.of("plan")) == 1
    assert engine.run(workspace.make_run("next"))["state"] == "SUCCEEDED"


def test_it_is_cancelled_while_the_engine_imports(
    start: Callable[..., EngineProcess], halted: list[psutil.Process], workspace: Workspace
) -> None:
    directory = workspace.make_run("cancelled")
    stop = {"type": "stop_run", "mode": "cancel", "grace_seconds": 30}
    engine = start(directory, stop, halts_planner=True)
    assert engine.wait_finished(directory)["state"] == "CANCELLED"
    log = read_log(directory)
    assert log.states == ["RUNNING", "STOPPING", "CANCELLED"]
    assert not log.of("plan")
    # It had a planner, which is gone; the one that is there waits for the next run.
    assert (directory / "planner-request.json").exists()
    assert not halted[0].is_running()
    (waiting,) = wait_for(lambda: _planners(engine))
    assert waiting.pid != halted[0].pid
    assert engine.run(workspace.make_run("after"))["state"] == "SUCCEEDED"


def test_its_planner_refuses_while_the_engine_imports(
    start: Callable[..., EngineProcess], workspace: Workspace
) -> None:
    directory = workspace.make_run("refused", hyperparameters={"lora": {"target_modules": ["no_such_layer"]}})
    engine = start(directory)
    assert engine.wait_finished(directory)["state"] == "FAILED"
    log = read_log(directory)
    assert log.states == ["RUNNING", "FAILED"]
    failure = log.of("run_state")[-1].failure
    assert (failure.reason, failure.fault) == (errors_pb2.ERROR_REASON_TARGETS_MATCH_NOTHING, errors_pb2.FAULT_USER)
    assert engine.run(workspace.make_run("after-refusal"))["state"] == "SUCCEEDED"


@pytest.mark.parametrize(("name", "leave"), [("asked", EngineProcess.terminate), ("alone", EngineProcess.close)])
def test_an_engine_that_leaves_meanwhile_leaves_the_run_to_another_and_no_planner_behind(
    name: str,
    leave: Callable[[EngineProcess], None],
    start: Callable[..., EngineProcess],
    halted: list[psutil.Process],
    workspace: Workspace,
) -> None:
    directory = workspace.make_run(name)
    engine = start(directory, halts_planner=True)
    wait_for((directory / "planner-request.json").exists)
    leave(engine)
    assert engine.wait_exit() == 0
    assert not halted[0].is_running()
    assert not (directory / "journal").exists()
