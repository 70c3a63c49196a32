"""R22: another process holds the database's write lock. Calls that write are told to come back, within their deadlines;
reads, watches and training go on; readiness says so and liveness does not; nothing acknowledged is lost, and it heals
by itself."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_service.adapters.sql.engine import sqlite_module
from tests.faults.driver import World, WorldConfig
from tests.faults.driver.verdict import judge
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2, project_service_pb2

_LOCK_SECONDS = 30.0
_DEADLINE_SECONDS = 10.0
_STATES = health_pb2.HealthCheckResponse


def run(trial: Trial) -> list[Finding]:
    """The lock is held for as long as the promise says."""
    return lock_store(trial, lock_seconds=_LOCK_SECONDS)


def lock_store(trial: Trial, *, lock_seconds: float) -> list[Finding]:
    """Holds the lock once while a job trains and clients write and read."""
    problems: list[str] = []
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        project_id = world.create_project(
            "p", [world.upload("rows")], script={"step_seconds": 0.05}, num_steps=1_000_000, save_every_steps=100
        )
        job_id = world.start_job(project_id)
        world.wait_for_step(job_id, 2)
        health = _Health(world.control.address)
        writers = [_Writer(world, number) for number in range(3)]
        for writer in writers:
            writer.start()
        before = _journal_blocks(world, job_id)
        with _locked(world.control_directory / "control.sqlite"):
            ends_at = time.monotonic() + lock_seconds
            world.wait_for("readiness to fall", lambda: health.ask("") == _STATES.NOT_SERVING)
            while time.monotonic() < ends_at:
                started = time.monotonic()
                assert world.get_job(job_id).state == event_pb2.JOB_STATE_RUNNING, "a read failed"
                if time.monotonic() - started > _DEADLINE_SECONDS:
                    problems.append("a read waited for the lock")
                if health.ask("liveness") != _STATES.SERVING:
                    problems.append("liveness fell with the lock")
                time.sleep(0.2)
            trained = _journal_blocks(world, job_id) > before
        healed = time.monotonic()
        world.wait_for("readiness", lambda: health.ask("") == _STATES.SERVING)
        # Still there: what nobody told control to do again, it does again by itself.
        reached = world.get_job(job_id).progress.step
        world.wait_for_step(job_id, reached + 5)
        heal_seconds = time.monotonic() - healed
        for writer in writers:
            writer.stop()
        health.close()
        world.client.call("CancelJob", job_service_pb2.CancelJobRequest(job_id=job_id))
        world.wait_until_over()
        world.stop()
        findings = judge(world)
    problems += [problem for writer in writers for problem in writer.problems]
    problems += [
        f"{line['method']} was told {line['outcome']} {line['reason']}"
        for line in world.evidence.read("operations")
        if line["outcome"] != "OK" and line["reason"] != "STORE_UNAVAILABLE"
    ]
    if not trained:
        problems.append("training stood still")
    refused = sum(writer.num_refused for writer in writers)
    if not refused:
        problems.append("nobody was told that the store is locked")
    tried = sum(writer.num_calls for writer in writers)
    return [
        Finding(
            promise="R22",
            tried=tried,
            held=tried - len(problems),
            violations=tuple(problems),
            worst=heal_seconds,
            unit="s",
            what="from the lock's end until the service is ready and its log goes on",
        ),
        *findings,
    ]


class _Writer:
    """A client that makes projects, one after the other, and takes no answer for one."""

    def __init__(self, world: World, number: int) -> None:
        self.problems: list[str] = []
        self.num_calls = 0
        self.num_refused = 0
        self._client = world.new_client(f"writer-{number}")
        self._random = random.Random(number)
        self._number = number
        self._address = world.control.address
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write, name=f"writer-{number}", daemon=True)
        self._project = project_service_pb2.Project()
        self._project.CopyFrom(world.client.call("ListProjects", project_service_pb2.ListProjectsRequest()).projects[0])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _write(self) -> None:
        while not self._stopping.wait(self._random.uniform(0.0, 0.2)):
            self.num_calls += 1
            project = project_service_pb2.Project()
            project.CopyFrom(self._project)
            project.name = f"writer-{self._number}-{self.num_calls}"
            request = project_service_pb2.CreateProjectRequest(
                project=project, request_id=f"{self._number}-{self.num_calls}"
            )
            started = time.monotonic()
            while self._client.call_once("CreateProject", [request], seconds=_DEADLINE_SECONDS) is None:
                self._judge(time.monotonic() - started)
                self.num_refused += 1
                # As RetryInfo asks.
                time.sleep(1.0)
                started = time.monotonic()

    def _judge(self, seconds: float) -> None:
        if seconds >= _DEADLINE_SECONDS:
            self.problems.append(f"a call was told nothing for {seconds:.1f} s")


class _Health:
    """Asks as a probe would."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
        self._stub: Any = health_pb2_grpc.HealthStub(self._channel)

    def ask(self, service: str) -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(self._stub.Check(request, timeout=_DEADLINE_SECONDS).status)

    def close(self) -> None:
        self._channel.close()


def _journal_blocks(world: World, job_id: str) -> int:
    """What the node's journal holds; grows while the engine trains."""
    directory = next(iter(world.node_directories.values()))
    return (directory / "runs" / job_id / "1" / "journal").stat().st_size


@contextmanager
def _locked(database: Path) -> Iterator[None]:
    """The write lock is this process' while inside."""
    connection = sqlite_module().connect(str(database), timeout=30.0, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


SCENARIO = Scenario(name="locked_store", promises=("R22", "R1", "R2"), num_trials=4, trial_seconds=60.0, run=run)
