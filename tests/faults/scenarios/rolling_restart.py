"""R26: each service is stopped in order and started again, in turn, while clients work. A client on bare stubs is told
nothing but to call again; the product's own client tells its user nothing at all; every stop is clean; jobs go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from tests.faults.driver import World, WorldConfig
from tests.faults.driver.verdict import judge
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2, plan_pb2
from tunesmith.control.v1 import job_service_pb2, job_service_pb2_grpc, project_service_pb2, project_service_pb2_grpc
from tunesmith_client import Client, ClientConfig, TunesmithError

_NUM_ROUNDS = 5
_CALL_SECONDS = 60.0
# What the gRPC documents and this service's own name as worth another call.
_RETRYABLE = frozenset({grpc.StatusCode.UNAVAILABLE})
_GRACE_SECONDS = 10.0


def run(trial: Trial) -> list[Finding]:
    """Some rounds over both services."""
    return restart_in_turn(trial, num_rounds=_NUM_ROUNDS)


def restart_in_turn(trial: Trial, *, num_rounds: int) -> list[Finding]:
    """Restarts control and the node in turn, `num_rounds` times."""
    problems: list[str] = []
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        project_id = world.create_project(
            "p", [world.upload("rows")], script={"step_seconds": 0.05}, num_steps=400, save_every_steps=50
        )
        job_id = world.start_job(project_id)
        world.wait_for_step(job_id, 2)
        clients = [_Raw(world.control.address, project_id), _Ours(world.control.address, project_id, job_id)]
        seconds = []
        for _ in range(num_rounds):
            for service in (world.control, world.node):
                seconds.append(service.restart())
                world.wait_for_nodes()
                reached = world.get_job(job_id).progress.step
                world.wait_for_step(job_id, reached + 1)
        for client in clients:
            client.stop()
        states = world.wait_until_over()
        world.stop()
        # What the load makes is not in the evidence.
        findings = [finding for finding in judge(world) if finding.promise not in ("R1", "R2")]
    for service in (world.control, world.node):
        problems += [f"{service.name} ended with status {status}" for status in service.statuses if status]
    problems += [f"job ended {event_pb2.JobState.Name(state)}" for state in states.values() if state != _SUCCEEDED]  # type: ignore[arg-type]
    problems += [problem for client in clients for problem in client.problems]
    tried = len(seconds) + sum(client.num_calls for client in clients)
    return [
        Finding(
            promise="R26",
            tried=tried,
            held=tried - len(problems),
            violations=tuple(problems),
            worst=max(seconds),
            unit="s",
            what="from SIGTERM until the successor serves",
        ),
        *findings,
    ]


_SUCCEEDED = event_pb2.JOB_STATE_SUCCEEDED


class _Load:
    """Calls, one after the other, in a thread of its own, until it is stopped."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.num_calls = 0
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._call_on, args=(call,), daemon=True) for call in self.calls()]
        for thread in self._threads:
            thread.start()

    def calls(self) -> list[Callable[[int], Any]]:
        """What each thread does again and again; given a number that rises."""
        raise NotImplementedError

    def judge(self, error: Exception) -> str:
        """What is wrong with what a call raised; empty when that is allowed."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ends it."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(_CALL_SECONDS)

    def _call_on(self, call: Callable[[int], Any]) -> None:
        number = 0
        while not self._stopping.wait(0.02):
            number += 1
            self.num_calls += 1
            try:
                call(number)
            except (grpc.RpcError, TunesmithError) as error:
                if problem := self.judge(error):
                    self.problems.append(problem)


class _Raw(_Load):
    """Bare stubs, which take what comes and say what it was."""

    def __init__(self, address: str, project_id: int) -> None:
        self._channel = grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
        self._jobs = job_service_pb2_grpc.JobServiceStub(self._channel)
        self._projects = project_service_pb2_grpc.ProjectServiceStub(self._channel)
        self._project_id = project_id
        super().__init__()

    def calls(self) -> list[Callable[[int], Any]]:
        return [self._list, self._create, self._plan]

    def stop(self) -> None:
        super().stop()
        self._channel.close()

    def judge(self, error: Exception) -> str:
        assert isinstance(error, grpc.RpcError), error
        code = error.code()
        return "" if code in _RETRYABLE else f"a bare stub was told {code.name}: {error.details()}"

    def _list(self, _: int) -> None:
        self._jobs.ListJobs(job_service_pb2.ListJobsRequest(), timeout=_CALL_SECONDS)

    def _create(self, number: int) -> None:
        found = self._projects.GetProject(
            project_service_pb2.GetProjectRequest(project_id=self._project_id), timeout=_CALL_SECONDS
        ).project
        found.name = f"raw-{number}"
        request = project_service_pb2.CreateProjectRequest(project=found, request_id=f"raw-{number}")
        self._projects.CreateProject(request, timeout=_CALL_SECONDS)

    def _plan(self, _: int) -> None:
        request = job_service_pb2.PlanTrainingRequest(project_id=self._project_id, level=plan_pb2.PLAN_LEVEL_CHECK)
        self._jobs.PlanTraining(request, timeout=_CALL_SECONDS)


class _Ours(_Load):
    """The product's client, as it comes."""

    def __init__(self, address: str, project_id: int, job_id: str) -> None:
        self._client = Client(config=ClientConfig(address=address))
        self._project_id = project_id
        self._job_id = job_id
        super().__init__()

    def calls(self) -> list[Callable[[int], Any]]:
        return [self._read, self._create, self._plan, self._watch]

    def stop(self) -> None:
        super().stop()
        self._client.close()

    def judge(self, error: Exception) -> str:
        return f"the client told its user {type(error).__name__}: {error}"

    def _read(self, _: int) -> None:
        self._client.jobs.get(self._job_id)

    def _create(self, number: int) -> None:
        project = self._client.projects.get(self._project_id)
        project.name = f"ours-{number}"
        self._client.projects.create(project)

    def _plan(self, _: int) -> None:
        self._client.jobs.plan(self._project_id)

    def _watch(self, _: int) -> None:
        started = time.monotonic()
        for _event in self._client.jobs.watch(self._job_id):
            if time.monotonic() - started > 5.0 or self._stopping.is_set():
                return


SCENARIO = Scenario(
    name="rolling_restart", promises=("R26", "R4", "R8", "R9"), num_trials=6, trial_seconds=90.0, run=run
)
