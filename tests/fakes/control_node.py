"""A node in memory: keeps runs with journals, and is driven by the test. `control_node_client` serves it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from control_service.app.ports import InspectDataset, StartRun
from control_service.domain.artifact import ArtifactKind, CheckpointStatus, FileReference
from control_service.domain.errors import (
    TunesmithError,
)
from control_service.domain.event import (
    ArtifactFact,
    CheckpointFact,
    Fact,
    PhaseFact,
    PlanFact,
    ResumedFact,
    RunStateFact,
    StepFact,
    StoredEvent,
)
from control_service.domain.failure import Failure, Fault
from control_service.domain.node import CatalogEntry, Device, NodeCapabilities, NodeReport
from control_service.domain.run import ObservedRun, Phase, RunKey, RunState, StopMode
from tests.fakes.control_codec import PickleCodec
from tests.fakes.control_jobs import make_node_model

_CODEC = PickleCodec()


@dataclass
class FakeRun:
    """One attempt on the node and its journal."""

    node: FakeNode
    request: StartRun
    state: RunState = RunState.ACCEPTED
    events: list[StoredEvent] = field(default_factory=list)
    failure: Failure | None = None
    stops: list[StopMode] = field(default_factory=list)

    def emit(self, *facts: Fact) -> None:
        for fact in facts:
            kind, payload = _CODEC.encode(fact)
            self.events.append(
                StoredEvent(
                    sequence=0,
                    attempt=self.request.key.attempt,
                    run_sequence=len(self.events) + 1,
                    kind=kind,
                    time=datetime.now(UTC),
                    payload=payload,
                )
            )
        self.node.changed()

    def begin(self) -> None:
        self.state = RunState.RUNNING
        self.emit(
            RunStateFact(state=RunState.RUNNING),
            PhaseFact(phase=Phase.PLANNING),
            PlanFact(num_steps=100, weights_digest="w" * 64, data_digest="d" * 64),
            PhaseFact(phase=Phase.TRAINING),
        )
        if self.request.resume_from is not None:
            resume = self.request.resume_from
            self.emit(ResumedFact(from_step=resume.step, checkpoint=resume.checkpoint))

    def step(self, number: int) -> None:
        self.emit(
            StepFact(
                step=number, total_steps=100, epoch=number / 100, loss=1.0, tokens_per_second=9.0, remaining_seconds=1.0
            )
        )

    def checkpoint(
        self,
        step: int,
        data: bytes = b"checkpoint",
        *,
        held_out_loss: float | None = None,
        best: bool = False,
        path: str = "",
    ) -> FileReference:
        file = self.node.add_file(data + str(step).encode(), path or f"step-{step}.safetensors")
        self.emit(
            CheckpointFact(
                name=f"step-{step:08d}",
                step=step,
                status=CheckpointStatus.COMMITTED,
                size_bytes=file.size_bytes,
                manifest_sha256="m" * 64,
                files=(file,),
                probe_loss=1.5,
                held_out_loss=held_out_loss,
                best=best,
            )
        )
        return file

    def succeed(self, data: bytes = b"adapter") -> FileReference:
        file = self.node.add_file(data, "adapter_model.safetensors")
        self.emit(ArtifactFact(name="adapter", kind=ArtifactKind.ADAPTER, files=(file,)))
        self.end(RunState.SUCCEEDED)
        return file

    def fail(self, reason: str, fault: Fault = Fault.PLATFORM, **details: str) -> None:
        self.failure = Failure(reason=reason, fault=fault, message="it broke", signal=9, details=details)
        self.end(RunState.FAILED)

    def end(self, state: RunState) -> None:
        self.state = state
        self.emit(RunStateFact(state=state, failure=self.failure))

    @property
    def is_over(self) -> bool:
        return self.observed().is_over

    def observed(self) -> ObservedRun:
        return ObservedRun(
            key=self.request.key,
            spec_digest=self.request.spec_digest,
            state=self.state,
            last_run_sequence=len(self.events),
            failure=self.failure,
            weights_digest="w" * 64,
        )


class FakeNode:
    """The node behind any number of clients. Set `is_up` False to make it silent."""

    def __init__(self, name: str, *, models: Sequence[str] = ("org/base",), num_devices: int = 1) -> None:
        self.name = name
        self.models = list(models)
        self.num_devices = num_devices
        self.is_up = True
        # Rises with every server of the node.
        self.instance = 1
        # What it is and can do is told once it is set.
        self.capabilities_gate: asyncio.Event | None = None
        self.obeys_stop = True
        # False: its bytes cannot be had just now.
        self.reads_blobs = True
        # They come once it is set.
        self.read_gate: asyncio.Event | None = None
        self.resident = ""
        self.runs: dict[tuple[str, int], FakeRun] = {}
        self.blobs: dict[str, bytes] = {}
        self.released: list[RunKey] = []
        # Names of those that it finds damaged when a run is to go on from them.
        self.damaged_checkpoints: set[str] = set()
        # True: its disk has no room for a blob.
        self.is_full = False
        self.start_error: TunesmithError | None = None
        self.plan_error: TunesmithError | None = None
        self.on_start: Callable[[FakeRun], None] = FakeRun.begin
        self.start_calls: list[StartRun] = []
        self.num_plans = 0
        self.inspections: list[InspectDataset] = []
        self.plan_timeouts: list[float | None] = []
        self._change = asyncio.Event()

    def changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def set_up(self, is_up: bool) -> None:
        self.is_up = is_up
        self.changed()

    def add_file(self, data: bytes, path: str) -> FileReference:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return FileReference(path=path, sha256=sha256, size_bytes=len(data))

    def run(self, job_id: str, attempt: int = 1) -> FakeRun:
        return self.runs[(job_id, attempt)]

    def report(self) -> NodeReport:
        busy = sum(1 for run in self.runs.values() if not run.is_over)
        return NodeReport(
            node_name=self.name,
            instance_id=f"{self.name}-{self.instance}",
            devices=tuple(_device(index) for index in range(self.num_devices)),
            runs=tuple(run.observed() for run in self.runs.values()),
            accepting=busy < self.num_devices,
            resident_base_model=self.resident,
        )

    def capabilities(self) -> NodeCapabilities:
        return NodeCapabilities(
            node_name=self.name,
            instance_id=f"{self.name}-{self.instance}",
            devices=tuple(_device(index) for index in range(self.num_devices)),
            models=tuple(
                make_node_model(name, weights_digest="w" * 64, has_chat_template=True) for name in self.models
            ),
            model_types=(CatalogEntry(id="llama", description="Llama", details={"config_types": "llama"}),),
        )

    async def wait_changed(self) -> None:
        await self._change.wait()


def _device(index: int) -> Device:
    return Device(index=index, type="cuda", name="fake", total_memory_bytes=2**30, free_memory_bytes=2**30)
