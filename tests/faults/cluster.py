"""One control service and several GPU services with stub engines, as real processes that can be stopped and killed
one by one. Cleans up whatever a trial left."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

from control_service.backup import make_backup, restore_backup
from control_service.domain.failpoints import ENVIRONMENT_VARIABLE
from tests.fakes.gpu_runs import is_alive
from tests.fakes.gpu_server import GpuServer
from tests.faults.driver.failpoints import Failpoints
from tunesmith.common.v1 import event_pb2, training_spec_pb2
from tunesmith.control.v1 import job_service_pb2, node_service_pb2, project_service_pb2
from tunesmith_cli.services import ServiceProcess
from tunesmith_client import Client, ClientConfig

T = TypeVar("T")
LEASE_SECONDS = 2.0
HEARTBEAT_SECONDS = 0.25
WAIT_SECONDS = 90.0


def wait_for(what: str, condition: Callable[[], T]) -> T:
    """The condition's first true value; AssertionError with `what` when there is none in time."""
    ends_at = time.monotonic() + WAIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < ends_at, f"waited {WAIT_SECONDS:.0f} s for {what}"
        time.sleep(0.02)
    return value


class Cluster:
    """`control_directory` may change between two starts of control."""

    def __init__(self, root: Path, names: str) -> None:
        self.root = root
        # Of control alone.
        self.failpoints = Failpoints(root / "failpoints")
        self.control_directory = root / "control"
        self.nodes: dict[str, GpuServer] = {}
        self._num_projects = 0
        self._control: ServiceProcess | None = None
        self._address = "127.0.0.1:0"
        self._lines: list[str] = []
        self.client: Client
        models = root / "models"
        for name in names:
            directory = root / name
            directory.mkdir(parents=True)
            if models.exists():
                (directory / "models").symlink_to(models)
            server = GpuServer(directory, name=name, engine_idle_seconds=600)
            if not models.exists():
                (directory / "models").rename(models)
                (directory / "models").symlink_to(models)
            self.nodes[name] = server

    # Processes.

    def start(self) -> None:
        for name, server in self.nodes.items():
            server.start()
            # Control knows it by this address, also after a restart.
            self.nodes[name].settings["address"] = server.address
        self.start_control()
        self.wait_for_nodes(*self.nodes)

    def start_control(self) -> None:
        """Starts control on its directory, at the address that it had."""
        command = [sys.executable, "-m", "control_service", "--address", self._address]
        command += ["--data-directory", str(self.control_directory)]
        command += ["--node-lease-seconds", str(LEASE_SECONDS), "--node-heartbeat-seconds", str(HEARTBEAT_SECONDS)]
        for name, server in self.nodes.items():
            command += ["--node", f"{name}={server.address}"]
        ready_file = self.root / "run" / "control.json"
        command = ["env", f"{ENVIRONMENT_VARIABLE}={self.failpoints.directory}", *command]
        self._control = ServiceProcess(
            "control", command, ready_file=ready_file, sink=lambda name, line: self._lines.append(line)
        )
        wait_for("control", lambda: ready_file.exists() or self._raise_if_ended())
        self._address = json.loads(ready_file.read_text())["address"]
        self.client = Client(config=ClientConfig(address=self._address))

    def _raise_if_ended(self) -> bool:
        assert self._control is not None
        assert self._control.status() is None, self._control.ended_text()
        return False

    def wait_for_end_of_control(self) -> None:
        """Waits until it died of a failpoint."""
        control = self._control
        assert control is not None
        wait_for("control's end", lambda: control.status() is not None)
        self.client.close()

    def kill_control(self) -> None:
        """SIGKILL."""
        assert self._control is not None
        self.client.close()
        self._control.kill()

    @property
    def control_pid(self) -> int:
        """Of the process that was started last."""
        assert self._control is not None
        return self._control.pid

    def tree(self, name: str) -> list[psutil.Process]:
        """Server, shims and engines of a node that are alive."""
        server = self.nodes[name]
        pids = {server.pid, *(shim["shim_pid"] for shim in server.shims()), *server.living_processes()}
        found = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found += [process, *process.children(recursive=True)]
        return list({process.pid: process for process in found if is_alive(process.pid)}.values())

    def signal_node(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to every process of a node, its server first."""
        server_pid = self.nodes[name].pid
        for process in sorted(self.tree(name), key=lambda process: process.pid != server_pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def close(self) -> None:
        """Ends everything."""
        if self._control is not None:
            self.client.close()
            self._control.kill()
        for name, server in self.nodes.items():
            with contextlib.suppress(AssertionError):
                self.signal_node(name, signal.SIGCONT)
            server.clean_up()

    def log_tail(self) -> str:
        """What control said last."""
        return "\n".join(self._lines[-60:])

    # Control's directory.

    def back_up(self) -> Path:
        """A backup of control while it runs."""
        make_backup(data_directory=self.control_directory, target=self.root / "backup")
        return self.root / "backup"

    def restore(self, backup: Path, directory: Path) -> None:
        """Puts a backup into another directory, on which control starts next."""
        restore_backup(source=backup, data_directory=directory, output_root=directory / "output")
        self.control_directory = directory

    # Jobs.

    def start_job(
        self,
        *,
        num_steps: int,
        save_every_steps: int = 0,
        script: dict[str, Any] | None = None,
        max_retries: int | None = None,
    ) -> str:
        """A job of a project and dataset of its own."""
        self._num_projects += 1
        name = f"project-{self._num_projects}"
        path = self.root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name} {n}?", "completion": "yes"}) + "\n" for n in range(20)))
        dataset = self.client.datasets.upload(path, name=f"{name}-{time.time_ns()}")
        source = training_spec_pb2.TraitDataset(dataset_id=dataset.dataset_id, percentage=100)
        prompts = [training_spec_pb2.SamplePrompt(prompt=json.dumps(script))] if script else []
        project = self.client.projects.create(
            project_service_pb2.Project(
                name=f"{name}-{time.time_ns()}",
                base_model="org/name",
                model_type="llama",
                training_type="lora",
                output_directory=f"./{name}",
                traits=[training_spec_pb2.Trait(trait_type="trait", datasets=[source])],
                hyperparameters=training_spec_pb2.Hyperparameters(
                    num_steps=num_steps, save_every_steps=save_every_steps, batch=training_spec_pb2.Batch(examples=1)
                ),
                sample_prompts=prompts,
            )
        )
        return str(self.client.jobs.start(project.project_id, max_retries=max_retries).job_id)

    def job(self, job_id: str) -> job_service_pb2.Job:
        return self.client.jobs.get(job_id)

    def node_of(self, job_id: str) -> str:
        """The node that has the job's run, once it has one."""
        running = event_pb2.JOB_STATE_RUNNING
        wait_for(f"{job_id} to run", lambda: self.job(job_id).state == running)
        return str(self.job(job_id).node)

    def wait_for_state(self, job_id: str, state: event_pb2.JobState.ValueType) -> job_service_pb2.Job:
        """Waits until the job is in a state."""
        wait_for(f"{job_id} to be {event_pb2.JobState.Name(state)}", lambda: self.job(job_id).state == state)
        return self.job(job_id)

    def log(self, job_id: str) -> list[event_pb2.Event]:
        """The job's log, checked to be 1..n, attempt after attempt."""
        events = list(self.client.jobs.events(job_id))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        attempts = [event.attempt for event in events]
        assert attempts == sorted(attempts), attempts
        return events

    def replicated_step(self, job_id: str) -> int:
        """Step of the newest checkpoint that control has; 0 if it has none."""
        replicated = event_pb2.CHECKPOINT_STATUS_REPLICATED
        steps = [c.step for c in self.client.jobs.checkpoints(job_id) if c.status == replicated]
        return max(steps, default=0)

    def wait_for_nodes(self, *names: str) -> None:
        """Waits until control hears from the nodes and knows their model."""

        def are_there() -> bool:
            reachable = {
                node.name for node in self.client.nodes.list() if node.state == node_service_pb2.NODE_STATE_REACHABLE
            }
            return reachable >= set(names) and any(model.name == "org/name" for model in self.client.models.list())

        wait_for("the nodes", are_there)

    def files_of(self, directory: Path) -> dict[str, tuple[bytes, int]]:
        """Every file below a directory: content and modification time in nanoseconds."""
        return {
            str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }


@contextlib.contextmanager
def running_cluster(root: Path, names: str) -> Iterator[Cluster]:
    """Starts one and ends it, whatever happens."""
    cluster = Cluster(root, names)
    try:
        cluster.start()
        yield cluster
    except BaseException:
        sys.stdout.write(cluster.log_tail() + "\n")
        raise
    finally:
        cluster.close()
