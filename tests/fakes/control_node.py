"""A node in memory: keeps runs with journals, serves them as a node would, and is driven by the test."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from control_service.app.ports import InspectDataset, PlanLevel, StartRun
from control_service.domain.artifact import ArtifactKind, CheckpointStatus, FileReference
from control_service.domain.dataset import DatasetInspection, RenderedExample, Segment, TokenStatistics
from control_service.domain.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    TunesmithError,
    Unavailable,
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
from control_service.domain.generation import GeneratedPart, GenerationRequest
from control_service.domain.node import CatalogEntry, Device, NodeCapabilities, NodeModel, NodeReport
from control_service.domain.run import ObservedRun, Phase, RunKey, RunState, StopMode
from control_service.domain.spec import TrainingSpec
from control_service.domain.start_from import start_files
from tests.fakes.control_codec import PickleCodec

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
    """The node behind any number of `FakeNodeClient`s. Set `is_up` False to make it silent."""

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

    async def wait_changed(self) -> None:
        await self._change.wait()


class FakeNodeClient:
    """Implements `NodeClient` over a `FakeNode`."""

    def __init__(self, node: FakeNode) -> None:
        self._node = node

    def _answer(self) -> FakeNode:
        if not self._node.is_up:
            raise Unavailable("NODE_UNREACHABLE", f"node {self._node.name} does not answer")
        return self._node

    async def capabilities(self) -> NodeCapabilities:
        node = self._answer()
        if node.capabilities_gate is not None:
            await node.capabilities_gate.wait()
        return NodeCapabilities(
            node_name=node.name,
            instance_id=f"{node.name}-{node.instance}",
            devices=tuple(_device(index) for index in range(node.num_devices)),
            models=tuple(_model(name) for name in node.models),
            model_types=(CatalogEntry(id="llama", description="Llama", details={"config_types": "llama"}),),
        )

    async def plan_run(
        self,
        *,
        spec: TrainingSpec,
        level: PlanLevel,
        probe_memory: bool = False,
        timeout_seconds: float | None = None,
    ) -> Mapping[str, Any]:
        node = self._answer()
        node.num_plans += 1
        node.plan_timeouts.append(timeout_seconds)
        if node.plan_error is not None:
            raise node.plan_error
        plan: dict[str, Any] = {"level": f"PLAN_LEVEL_{level.value}", "num_steps": "100"}
        return {**plan, "memory_probe": {"peak_bytes": "7"}} if probe_memory else plan

    async def inspect_dataset(
        self, request: InspectDataset, *, timeout_seconds: float | None = None
    ) -> DatasetInspection:
        node = self._answer()
        node.inspections.append(request)
        if request.dataset.sha256 not in node.blobs:
            raise FailedPrecondition("BLOB_NOT_FOUND", request.dataset.sha256)
        lines = node.blobs[request.dataset.sha256].decode().splitlines()
        rows = tuple(
            RenderedExample(
                segments=(Segment(text=line, is_target=True, num_tokens=len(line)),),
                num_tokens=len(line),
                num_target_tokens=len(line),
            )
            for line in lines
        )
        total = sum(row.num_tokens for row in rows)
        tokens = TokenStatistics(
            base_model=request.base_model,
            num_tokens=total,
            num_target_tokens=total,
            longest_tokens=max(row.num_tokens for row in rows),
            num_truncated=0,
        )
        return DatasetInspection(rows=rows[: request.num_rows], tokens=tokens if request.count_tokens else None)

    async def start_run(self, request: StartRun) -> ObservedRun:
        node = self._answer()
        node.start_calls.append(request)
        if node.start_error is not None:
            raise node.start_error
        key = (request.key.job_id, request.key.attempt)
        known = node.runs.get(key)
        if known is not None:
            if known.request.spec_digest != request.spec_digest:
                raise AlreadyExists("RUN_CONFLICT", "another spec")
            return known.observed()
        resume = request.resume_from
        if resume is not None and not resume.files and (key[0], resume.attempt) not in node.runs:
            raise NotFound("CHECKPOINT_NOT_FOUND", f"no checkpoint {resume.checkpoint} is here")
        if resume is not None and not resume.files and resume.checkpoint in node.damaged_checkpoints:
            raise FailedPrecondition("RESUME_MISMATCH", f"checkpoint {resume.checkpoint} is damaged")
        highest = max((attempt for job_id, attempt in node.runs if job_id == key[0]), default=0)
        if key[1] < highest:
            raise FailedPrecondition("STALE_EPOCH", f"attempt {highest} is known")
        if not node.report().accepting:
            raise ResourceExhausted("NODE_BUSY", "no device is free")
        needed = {d.sha256 for d in request.spec.datasets}
        needed |= {file.sha256 for file in (request.resume_from.files if request.resume_from else ())}
        needed |= {file.sha256 for file in start_files(request.spec)}
        if not needed <= node.blobs.keys():
            raise FailedPrecondition("BLOB_NOT_FOUND", "a blob is missing")
        run = node.runs[key] = FakeRun(node, request)
        node.resident = request.spec.base_model
        node.on_start(run)
        node.changed()
        return run.observed()

    async def get_run(self, key: RunKey) -> ObservedRun | None:
        run = self._answer().runs.get((key.job_id, key.attempt))
        return None if run is None else run.observed()

    async def stop_run(self, key: RunKey, *, mode: StopMode, grace_seconds: float = 0.0) -> ObservedRun | None:
        run = self._answer().runs.get((key.job_id, key.attempt))
        if run is None:
            return None
        run.stops.append(mode)
        if not run.is_over:
            run.state = RunState.STOPPING
            if self._node.obeys_stop and mode is StopMode.CANCEL:
                run.end(RunState.CANCELLED)
            elif self._node.obeys_stop:
                run.checkpoint(10)
                run.end(RunState.INTERRUPTED)
        return run.observed()

    async def release_run(self, key: RunKey) -> int:
        node = self._answer()
        node.released.append(key)
        node.runs.pop((key.job_id, key.attempt), None)
        node.changed()
        return 1

    async def watch_run(self, key: RunKey, *, after_run_sequence: int) -> AsyncIterator[Sequence[StoredEvent]]:
        position = after_run_sequence
        while True:
            run = self._answer().runs.get((key.job_id, key.attempt))
            if run is None:
                raise NotFound("RUN_NOT_FOUND", "no such run")
            batch = run.events[position:]
            if batch:
                position = len(run.events)
                yield [replace(event) for event in batch]
            elif run.is_over:
                return
            else:
                await self._node.wait_changed()

    async def watch_node(self, *, heartbeat_seconds: float) -> AsyncIterator[NodeReport]:
        while True:
            yield self._answer().report()
            try:
                await asyncio.wait_for(self._node.wait_changed(), heartbeat_seconds)
            except TimeoutError:
                continue

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedPart, None]:
        yield GeneratedPart(text=self._answer().name, num_tokens=1)
        yield GeneratedPart(text="", num_tokens=0, finish_reason="STOP", statistics={"num_tokens": 1})

    async def find_missing_blobs(self, sha256s: Sequence[str]) -> Mapping[str, int]:
        node = self._answer()
        return {sha256: 0 for sha256 in sha256s if sha256 not in node.blobs}

    async def write_blob(self, *, sha256: str, size_bytes: int, offset: int, chunks: AsyncIterable[bytes]) -> None:
        data = b"".join([chunk async for chunk in chunks])
        node = self._answer()
        if node.is_full:
            raise ResourceExhausted("DISK_FULL", f"{size_bytes} bytes do not fit the disk")
        node.blobs[sha256] = data

    async def read_blob(self, sha256: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        node = self._answer()
        if node.read_gate is not None:
            await node.read_gate.wait()
        if not node.reads_blobs:
            raise Unavailable("NODE_UNREACHABLE", "no bytes now")
        if sha256 not in node.blobs:
            raise NotFound("BLOB_NOT_FOUND", sha256)
        yield node.blobs[sha256][offset:]

    async def close(self) -> None:
        return None


class FakeDialer:
    """Implements `NodeDialer`: the address is the node's name."""

    def __init__(self, *nodes: FakeNode) -> None:
        self.nodes = {node.name: node for node in nodes}

    def dial(self, *, name: str, address: str, installation_id: str) -> FakeNodeClient:
        return FakeNodeClient(self.nodes[address])


def _device(index: int) -> Device:
    return Device(index=index, type="cuda", name="fake", total_memory_bytes=2**30, free_memory_bytes=2**30)


def _model(name: str) -> NodeModel:
    return NodeModel(
        name=name,
        config_type="llama",
        weights_digest="w" * 64,
        size_bytes=1,
        num_parameters=1,
        vocabulary_size=1,
        has_chat_template=True,
    )
