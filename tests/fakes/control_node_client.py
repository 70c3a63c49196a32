"""Control's client of a node in memory: answers as the node would, unless the test has it silent, full or slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from control_service.app.ports import InspectDataset, PlanLevel, StartRun
from control_service.domain.dataset import DatasetInspection, RenderedExample, Segment, TokenStatistics
from control_service.domain.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from control_service.domain.event import StoredEvent
from control_service.domain.generation import GeneratedPart, GenerationRequest
from control_service.domain.node import NodeCapabilities, NodeReport
from control_service.domain.run import ObservedRun, RunKey, RunState, StopMode
from control_service.domain.spec import TrainingSpec
from control_service.domain.start_from import start_files
from tests.fakes.control_node import FakeNode, FakeRun


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
        return node.capabilities()

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
