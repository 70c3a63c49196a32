"""A run that a new engine is given before its libraries are imported, as the first run of a node is: real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
def start(tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    """A new engine that has been sent a run, and whatever follows it, before it could be ready."""
    with ExitStack() as stack:

        def start(directory: Path, *messages: dict[str, Any]) -> EngineProcess:
            engine = stack.enter_context(EngineProcess(tmp_path / "engine.log"))
            for message in ({"type": "start_run"}, *messages):
                engine.send(run_directory=str(directory), **message)
            return engine

        yield start


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


def test_it_is_cancelled_while_the_engine_imports(start: Callable[..., EngineProcess], workspace: Workspace) -> None:
    directory = workspace.make_run("cancelled")
    engine = start(directory, {"type": "stop_run", "mode": "cancel", "grace_seconds": 30})
    assert engine.wait_finished(directory)["state"] == "CANCELLED"
    log = read_log(directory)
    assert log.states == ["RUNNING", "STOPPING", "CANCELLED"]
    assert not log.of("plan")
    # Nothing of its planner is left but the one that waits for the next run.
    wait_for(lambda: all("--wait" in child.cmdline() for child in psutil.Process(engine.process.pid).children()))
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


def test_an_engine_that_is_asked_to_leave_meanwhile_leaves_the_run_interrupted(
    start: Callable[..., EngineProcess], workspace: Workspace
) -> None:
    directory = workspace.make_run("leaving")
    engine = start(directory)
    wait_for((directory / "planner-request.json").exists)
    engine.terminate()
    assert engine.wait_exit() == 0
    assert not (directory / "journal").exists() or read_log(directory).states[-1] == "INTERRUPTED"
