"""The pair as real processes for tests: started and stopped by the product's own code, killed as a crash would.

With the stub engine there is no torch; what it does is scripted by the project's first sample prompt.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tunesmith.common.v1 import event_pb2, training_spec_pb2
from tunesmith.control.v1 import job_service_pb2, node_service_pb2, project_service_pb2
from tunesmith_cli.services import NODE_NAME, Pair, PairConfig
from tunesmith_client import Client, ClientConfig

Value = TypeVar("Value")

STUB_ENGINE = [sys.executable, "-m", "tests.fakes.stub_engine"]
WAIT_SECONDS = 60.0


def wait_for(what: str, condition: Callable[[], Value], *, seconds: float = WAIT_SECONDS) -> Value:
    """The condition's first true value. AssertionError with `what` when there is none in time."""
    ends_at = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < ends_at, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


class PairUnderTest:
    """A running pair, its client, and shorthands for what tests do to it."""

    def __init__(self, pair: Pair, client: Client, base_model: str, lines: list[str]) -> None:
        self.pair = pair
        self.client = client
        self.base_model = base_model
        self.lines = lines
        self.node_directory = pair.config.data_directory / f"node-{NODE_NAME}"

    def project(
        self,
        name: str,
        *,
        num_steps: int = 5,
        save_every_steps: int = 0,
        script: dict[str, Any] | None = None,
        **fields: Any,
    ) -> project_service_pb2.Project:
        """A project with one trait and one dataset of its own."""
        path = self.pair.config.data_directory / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {n}?", "completion": f"answer {n}"} for n in range(20)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = self.client.datasets.upload(path, name=name)
        source = training_spec_pb2.TraitDataset(dataset_id=dataset.dataset_id, percentage=100)
        prompts = [training_spec_pb2.SamplePrompt(prompt=json.dumps(script))] if script else []
        project = project_service_pb2.Project(
            name=name,
            base_model=self.base_model,
            model_type="llama",
            training_type=fields.pop("training_type", "lora"),
            output_directory=f"./{name}",
            traits=[training_spec_pb2.Trait(trait_type="trait", datasets=[source])],
            hyperparameters=training_spec_pb2.Hyperparameters(
                num_steps=num_steps, save_every_steps=save_every_steps, **fields
            ),
            sample_prompts=prompts,
        )
        return self.client.projects.create(project)

    def start(self, name: str, *, max_retries: int | None = None, **options: Any) -> job_service_pb2.Job:
        """Starts a job of a project made for it."""
        return self.client.jobs.start(self.project(name, **options).project_id, max_retries=max_retries)

    def wait_for_step(self, job_id: str, step: int) -> None:
        """Waits until the job's log has this step."""
        wait_for(f"step {step}", lambda: self.client.jobs.get(job_id).progress.step >= step)

    def log(self, job_id: str) -> list[event_pb2.Event]:
        """The job's whole log, checked to be 1..n without a gap or a duplicate."""
        events = list(self.client.jobs.events(job_id))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        return events

    def journal_size(self, job_id: str, attempt: int = 1) -> int:
        """Bytes that the node's journal of an attempt holds; grows while the engine trains."""
        return (self.node_directory / "runs" / job_id / str(attempt) / "journal").stat().st_blocks

    def shims(self) -> list[psutil.Process]:
        """The node's shims that are alive."""
        found = []
        for file in self.node_directory.glob("engines/*/shim.json"):
            with contextlib.suppress(psutil.NoSuchProcess, OSError, ValueError):
                process = psutil.Process(json.loads(file.read_text())["shim_pid"])
                if "gpu_service.shim" in process.cmdline():
                    found.append(process)
        return found

    def engines(self) -> list[psutil.Process]:
        """The engines that are alive: children of the shims."""
        return [child for shim in self.shims() for child in shim.children()]

    def kill_engine(self) -> None:
        """Kills the one engine with SIGKILL."""
        (engine,) = self.engines()
        os.kill(engine.pid, signal.SIGKILL)

    def restart_control(self) -> None:
        """Starts control again, at its address, after a kill."""
        self.pair.start_control().wait_ready(stopped=self.pair.stopped)

    def restart_gpu(self) -> None:
        """Starts the GPU server again, at its address, after a kill."""
        self.pair.start_gpu().wait_ready(stopped=self.pair.stopped)

    def wait_for_node(self) -> None:
        """Waits until control hears from the node and knows its model."""

        def is_there() -> bool:
            nodes = self.client.nodes.list()
            return any(node.state == node_service_pb2.NODE_STATE_REACHABLE for node in nodes) and any(
                model.name == self.base_model for model in self.client.models.list()
            )

        wait_for("the node", is_there)


@contextlib.contextmanager
def running_pair(directory: Path, models_directory: Path, base_model: str) -> Iterator[PairUnderTest]:
    """Starts the pair on ports of its own and stops it; nothing that it started is left behind."""
    config = PairConfig(
        data_directory=directory,
        models_directory=models_directory,
        control_address="127.0.0.1:0",
        gpu_address="127.0.0.1:0",
    )
    directory.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    pair = Pair(config, sink=lambda name, line: lines.append(f"{name} | {line}"))
    under_test: PairUnderTest | None = None
    try:
        with pair, Client(config=ClientConfig(address=pair.address)) as client:
            under_test = PairUnderTest(pair, client, base_model, lines)
            under_test.wait_for_node()
            yield under_test
    finally:
        # A test that failed half-way may leave an engine that was meant to outlive its server.
        for shim in under_test.shims() if under_test else []:
            for process in [*shim.children(recursive=True), shim]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        # Shown by pytest only when the test failed.
        sys.stdout.write("\n".join(lines[-200:]) + "\n")
