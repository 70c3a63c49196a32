"""A trial's world: control, one or several nodes, clients and consumers, and what breaks them. Judges nothing.

Whatever a trial does, leaving the context ends every process that it started.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.fakes.tiny_models import place, place_header_only
from tests.faults.driver import engines
from tests.faults.driver.consumers import Consumer
from tests.faults.driver.engines import EngineProcesses
from tests.faults.driver.evidence import Evidence
from tests.faults.driver.failpoints import ENVIRONMENT_VARIABLE, Failpoints
from tests.faults.driver.observer import Observer
from tests.faults.driver.operations import LoggedClient, Refused
from tests.faults.driver.services import CONTROL, Service, environment
from tunesmith.common.v1 import event_pb2, training_spec_pb2
from tunesmith.control.v1 import job_service_pb2, node_service_pb2, project_service_pb2

Value = TypeVar("Value")

STUB_COMMAND = (sys.executable, "-m", "tests.fakes.stub_engine")
WAIT_SECONDS = 150.0
_LOOK_SECONDS = 0.1
# What makes tiny models keeps them for the process, and may be asked by one thread at a time.
_placing = threading.Lock()
OVER = frozenset({event_pb2.JOB_STATE_SUCCEEDED, event_pb2.JOB_STATE_FAILED, event_pb2.JOB_STATE_CANCELLED})


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What is started."""

    directory: Path
    seed: int
    nodes: Sequence[str] = ("a",)
    # Of its evidence: a directory may see several worlds, one after another.
    name: str = "evidence"
    # Failpoints that are armed before anything starts.
    armed: Sequence[str] = ()
    real_engine: bool = False
    # By flag without its dashes in front; True is a flag without a value, False none.
    control_flags: Mapping[str, Any] = field(default_factory=dict)
    node_flags: Mapping[str, Any] = field(default_factory=dict)


# Kept, because the checker reads them; reachable again within seconds, because trials are many.
_CONTROL_FLAGS: Mapping[str, Any] = {
    "no-release-runs": True,
    "node-heartbeat-seconds": 1.0,
    "node-lease-seconds": 30.0,
}
_NODE_FLAGS: Mapping[str, Any] = {"grace-seconds": 10, "orphan-limit-seconds": 600}


class World:
    """A context manager: everything runs inside, nothing is left outside."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.random = random.Random(config.seed)
        self.directory = config.directory.absolute()
        self.control_directory = self.directory / "control"
        self.node_directories = {name: self.directory / f"node-{name}" for name in config.nodes}
        self.evidence = Evidence(self.directory / config.name)
        self.failpoints = Failpoints(self.directory / f"{config.name}-failpoints")
        self.services: dict[str, Service] = {}
        self.consumers: list[Consumer] = []
        self.job_ids: list[str] = []
        self._clients: list[LoggedClient] = []
        self._stopped: set[int] = set()
        self._observer: Observer | None = None

    # Start and end.

    def __enter__(self) -> Self:
        models = self.directory / "models"
        self.base_model = "tiny/llama"
        with _placing:
            if not models.exists():
                self.base_model = place(models) if self.config.real_engine else place_header_only(models)
        self._describe(all_over=False)
        for armed in self.config.armed:
            self.failpoints.arm(armed)
        try:
            for name in self.config.nodes:
                self._start(name, "gpu_service", self._node_flags(name))
            for name in self.config.nodes:
                self.services[name].wait_ready()
            self._start(CONTROL, "control_service", self.control_flags())
            self.control.wait_ready()
            self._observer = self._observe()
            self.client = self.new_client("client")
            self.wait_for_nodes()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self.continue_all()
        self.failpoints.disarm_all()
        for consumer in self.consumers:
            consumer.close()
        for client in self._clients:
            client.close()
        # A node first: control still hears how its runs ended.
        for service in sorted(self.services.values(), key=lambda service: service.name == CONTROL):
            service.stop()
        if self._observer is not None:
            self._observer.stop()
        for directory in self.node_directories.values():
            engines.end_all(directory)

    def _describe(self, *, all_over: bool) -> None:
        self.evidence.describe(
            seed=self.config.seed,
            control_directory=self.control_directory,
            output_root=self.control_directory / "output",
            node_directories=self.node_directories,
            node_lease_seconds={**_CONTROL_FLAGS, **self.config.control_flags}["node-lease-seconds"],
            all_over=all_over,
        )

    def _observe(self) -> Observer:
        return Observer(
            node_directories=self.node_directories,
            evidence=self.evidence,
            failpoints=self.failpoints,
            service_of=lambda pid: next((one.kind for one in self.services.values() if pid in one.pids), ""),
        )

    def _start(self, name: str, module: str, flags: Sequence[str]) -> None:
        variables = {ENVIRONMENT_VARIABLE: str(self.failpoints.directory), "OMP_NUM_THREADS": "1"}
        if module == "gpu_service" and not self.config.real_engine:
            variables["TUNESMITH_GPU_ENGINE_COMMAND"] = json.dumps(STUB_COMMAND)
        self.services[name] = Service(
            name,
            module,
            flags,
            directory=self.directory,
            variables=variables,
            evidence=self.evidence,
            failpoints=self.failpoints,
        )

    def control_flags(self, **changed: Any) -> list[str]:
        """Control's flags, with some changed (names with underscores)."""
        nodes = {f"{name}={self.services[name].address}" for name in self.config.nodes}
        flags = {**_CONTROL_FLAGS, **self.config.control_flags, "data-directory": self.control_directory}
        flags |= {name.replace("_", "-"): value for name, value in changed.items()}
        return [*_as_arguments(flags), *(word for node in sorted(nodes) for word in ("--node", node))]

    def _node_flags(self, name: str) -> list[str]:
        flags = {**_NODE_FLAGS, **self.config.node_flags, "name": name}
        flags |= {"data-directory": self.node_directories[name], "models-directory": self.directory / "models"}
        return _as_arguments(flags)

    @property
    def control(self) -> Service:
        return self.services[CONTROL]

    @property
    def node(self) -> Service:
        """The one node, or the first."""
        return self.services[self.config.nodes[0]]

    # What clients do.

    def new_client(self, name: str) -> LoggedClient:
        """A client of its own, whose calls are written down."""
        client = LoggedClient(name, self.control.address, self.evidence)
        self._clients.append(client)
        return client

    def upload(self, name: str, num_rows: int = 20) -> int:
        """A dataset of prompts and completions; gives its id."""
        rows = [{"prompt": f"{name} {number}?", "completion": f"answer {number}"} for number in range(num_rows)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return int(self.client.upload(name, content).dataset_id)

    def create_project(
        self, name: str, dataset_ids: Sequence[int], *, script: Mapping[str, Any] | None = None, **fields: Any
    ) -> int:
        """A project with one trait over these datasets in equal parts; `fields` are hyperparameters."""
        part = 100.0 / len(dataset_ids)
        sources = [training_spec_pb2.TraitDataset(dataset_id=number, percentage=part) for number in dataset_ids]
        prompts = [training_spec_pb2.SamplePrompt(prompt=json.dumps(dict(script)))] if script else []
        project = project_service_pb2.Project(
            name=name,
            base_model=self.base_model,
            model_type="llama",
            training_type=fields.pop("training_type", "lora"),
            output_directory=f"./{name}",
            traits=[training_spec_pb2.Trait(trait_type="trait", datasets=sources)],
            hyperparameters=training_spec_pb2.Hyperparameters(**fields),
            sample_prompts=prompts,
        )
        request = project_service_pb2.CreateProjectRequest(project=project)
        return int(self.client.call("CreateProject", request).project.project_id)

    def start_job(self, project_id: int, *, max_retries: int = 100, num_consumers: int = 1) -> str:
        """A job with consumers that follow it from its first event; gives its id."""
        request = job_service_pb2.StartTrainingRequest(project_id=project_id, max_retries=max_retries)
        job_id = str(self.client.call("StartTraining", request, seconds=60.0).job.job_id)
        self.job_ids.append(job_id)
        for _ in range(num_consumers):
            name = f"consumer-{len(self.consumers) + 1}"
            self.consumers.append(Consumer(name, job_id, address=self.control.address, evidence=self.evidence))
        return job_id

    def cancel(self, job_id: str) -> None:
        """Asks for its end."""
        self.client.call("CancelJob", job_service_pb2.CancelJobRequest(job_id=job_id))

    def get_job(self, job_id: str) -> Any:
        """The job as control has it now."""
        return self.client.call("GetJob", job_service_pb2.GetJobRequest(job_id=job_id)).job

    def events(self, job_id: str) -> list[event_pb2.Event]:
        """The whole log."""
        found: list[event_pb2.Event] = []
        while True:
            after = found[-1].sequence if found else 0
            request = job_service_pb2.ListJobEventsRequest(job_id=job_id, after_sequence=after, page_size=1000)
            page = self.client.call("ListJobEvents", request)
            found += page.events
            if not page.events or found[-1].sequence >= page.last_sequence:
                return found

    # Waiting.

    def wait_for(self, what: str, condition: Callable[[], Value], *, seconds: float = WAIT_SECONDS) -> Value:
        """The condition's first true value. AssertionError with `what` when there is none in time."""
        deadline = time.monotonic() + seconds
        while True:
            value = condition()
            if value:
                return value
            problems = self.problems()
            assert not problems, problems
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}\n{self.log_tails()}"
            time.sleep(_LOOK_SECONDS)

    def wait_for_nodes(self) -> None:
        """Until control hears from every node."""

        def are_there() -> bool:
            nodes = self.client.call("ListNodes", node_service_pb2.ListNodesRequest()).nodes
            reachable = [node for node in nodes if node.state == node_service_pb2.NODE_STATE_REACHABLE]
            return len(reachable) == len(self.config.nodes)

        self.wait_for("the nodes", are_there)

    def wait_for_step(self, job_id: str, step: int, *, seconds: float = WAIT_SECONDS) -> None:
        """Until the job has done a step, or is over."""

        def is_there() -> bool:
            job = self.get_job(job_id)
            return job.progress.step >= step or job.state in OVER

        self.wait_for(f"step {step} of job {job_id}", is_there, seconds=seconds)

    def wait_for_state(self, job_id: str, *states: int, seconds: float = WAIT_SECONDS) -> int:
        """Until the job has one of the states; gives it."""
        self.wait_for(
            f"a state of {states} of job {job_id}", lambda: self.get_job(job_id).state in states, seconds=seconds
        )
        return int(self.get_job(job_id).state)

    def problems(self) -> list[str]:
        """Services that could not be kept alive."""
        return [problem for service in self.services.values() for problem in service.problems]

    def log_tails(self) -> str:
        """The end of what every service printed."""
        return "\n".join(f"--- {service.name}\n{service.log_tail()}" for service in self.services.values())

    # Faults.

    def engines(self) -> list[EngineProcesses]:
        """Every shim that lives, on any node."""
        return [found for node, path in self.node_directories.items() for found in engines.living(node, path)]

    def signal_engine(self, number: signal.Signals, kind: str, *, target: str = "engine", job_id: str = "") -> int:
        """Signals the engine (or its shim) that has the job, or any; gives its pid, 0 when there is none."""
        found = [one for one in self.engines() if (one.job_id == job_id if job_id else True)]
        if not found:
            return 0
        one = self.random.choice(found)
        pid = one.engine_pid if target == "engine" else one.shim_pid
        if not engines.send(pid, number):
            return 0
        self.evidence.fault(kind=kind, target=target, pid=pid)
        if number is signal.SIGSTOP:
            self._stopped.add(pid)
        return pid

    def stop_service(self, name: str) -> None:
        """SIGSTOP to a service, until `continue_all`."""
        self.services[name].signal(signal.SIGSTOP, "stop")
        self._stopped.add(self.services[name].pid)

    def continue_all(self) -> None:
        """SIGCONT to all that was stopped."""
        for pid in sorted(self._stopped):
            if engines.send(pid, signal.SIGCONT):
                self.evidence.fault(kind="continue", target="", pid=pid)
        self._stopped.clear()

    def run_chore(self, module: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A command of the product, with the trial's failpoints."""
        variables = environment({ENVIRONMENT_VARIABLE: str(self.failpoints.directory)})
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)

    # After the faults.

    def heal(self) -> list[str]:
        """Everything may run again; gives the failpoints that nobody took."""
        left = self.failpoints.disarm_all()
        self.continue_all()
        for service in self.services.values():
            service.release()
        for service in self.services.values():
            service.wait_ready()
        return left

    def wait_until_over(self, *, seconds: float = WAIT_SECONDS) -> dict[str, int]:
        """Until every job is over and every consumer has heard all of it; gives the jobs' states."""
        states = {job_id: self.wait_for_state(job_id, *OVER, seconds=seconds) for job_id in self.job_ids}
        for consumer in self.consumers:
            consumer.join(seconds)
        return states

    def stop(self) -> None:
        """Stops the services in order: what they leave on the disk is the evidence."""
        for service in sorted(self.services.values(), key=lambda service: service.name == CONTROL):
            status = service.stop()
            assert status == 0, f"{service.name} stopped with status {status}\n{service.log_tail()}"
        assert not self.problems(), self.problems()
        if self._observer is not None:
            self._observer.stop()
        self._describe(all_over=True)

    @property
    def num_kills(self) -> int:
        """Processes killed so far."""
        return sum(line["kind"] in ("kill", "failpoint") for line in self.evidence.read("faults"))


def _as_arguments(flags: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        if value is False:
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


__all__ = ["OVER", "Refused", "World", "WorldConfig"]
