"""R31: a second process on the same data directory or port, of either service, while the first works; a restore onto a
directory that is in use; and a backup of it. Whoever comes second refuses, the first is unharmed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.driver import World, WorldConfig
from tests.faults.driver.services import environment
from tests.faults.driver.verdict import judge
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.control.v1 import job_service_pb2, project_service_pb2

_PATIENCE_SECONDS = 120.0
_TAKEN = 3
_NUM_ROUNDS = 3


def run(trial: Trial) -> list[Finding]:
    """Some rounds of every kind of second."""
    return start_seconds(trial, num_rounds=_NUM_ROUNDS)


def start_seconds(trial: Trial, *, num_rounds: int) -> list[Finding]:
    """Starts all of them at the same time, `num_rounds` times, while a job trains and projects are made."""
    problems: list[str] = []
    tried = 0
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        project_id = world.create_project(
            "p", [world.upload("rows")], script={"step_seconds": 0.05}, num_steps=1_000_000, save_every_steps=100
        )
        job_id = world.start_job(project_id)
        world.wait_for_step(job_id, 2)
        pids = (world.control.pid, world.node.pid)
        for number in range(num_rounds):
            reached = world.get_job(job_id).progress.step
            elsewhere = trial.directory / f"second-{number}"
            backup = elsewhere / "backup"
            seconds = {
                "control on the same directory": _control(world, world.control_directory, "127.0.0.1:0"),
                "control on the same port": _control(world, elsewhere / "control", world.control.address),
                "node on the same directory": _node(world, world.node_directories["a"], "127.0.0.1:0"),
                "node on the same port": _node(world, elsewhere / "node", world.node.address),
                "backup": _chore("backup", "--data-directory", world.control_directory, "--to", backup),
            }
            # Work goes on meanwhile.
            for count in range(5):
                _make_project(world, project_id, f"beside-{number}-{count}")
            expected = dict.fromkeys(seconds, _TAKEN) | {"backup": 0}
            problems += _ended(seconds, expected)
            restore = {"restore": _chore("restore", "--from", backup, "--data-directory", world.control_directory)}
            problems += _ended(restore, {"restore": _TAKEN})
            tried += len(seconds) + 1
            world.wait_for_step(job_id, reached + 5)
            if (world.control.pid, world.node.pid) != pids:
                problems.append("the first did not live through it")
        world.client.call("CancelJob", job_service_pb2.CancelJobRequest(job_id=job_id))
        world.wait_until_over()
        world.stop()
        findings = judge(world)
    held = tried - min(tried, len(problems))
    return [Finding(promise="R31", tried=tried, held=held, violations=tuple(problems)), *findings]


def _control(world: World, directory: Path, address: str) -> subprocess.Popen[str]:
    return _start("control_service", "--data-directory", directory, "--address", address, "--node", "")


def _node(world: World, directory: Path, address: str) -> subprocess.Popen[str]:
    flags = ("--data-directory", directory, "--address", address, "--models-directory", world.directory / "models")
    return _start("gpu_service", *flags, "--name", "a")


def _chore(*words: str | Path) -> subprocess.Popen[str]:
    return _start("control_service", *words)


def _start(module: str, *words: str | Path) -> subprocess.Popen[str]:
    command: Sequence[str] = [sys.executable, "-m", module, *(str(word) for word in words)]
    return subprocess.Popen(command, env=environment({}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _ended(seconds: dict[str, subprocess.Popen[str]], expected: dict[str, int]) -> list[str]:
    """What is wrong with how they ended; none is left running."""
    problems = []
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for name, process in seconds.items():
        try:
            said, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            problems.append(f"a second {name} did not end: {said[-300:]}")
            continue
        if process.returncode != expected[name]:
            problems.append(f"a second {name} ended with status {process.returncode}: {said[-300:]}")
        elif expected[name] and not said.strip():
            problems.append(f"a second {name} did not say why it refused")
    return problems


def _make_project(world: World, project_id: int, name: str) -> None:
    found = world.client.call("GetProject", project_service_pb2.GetProjectRequest(project_id=project_id)).project
    found.name = name
    world.client.call("CreateProject", project_service_pb2.CreateProjectRequest(project=found))


SCENARIO = Scenario(name="twins", promises=("R31", "R1"), num_trials=4, trial_seconds=45.0, run=run)
