"""A GPU node that trains nothing: RunService and BlobService over real gRPC, playing a script of events into journals.

It keeps a node's promises (fencing, same run for the same request, gap-free journals, blobs by content) in memory. A
test holds a run at a step with `hold_at_step` and lets it go on with `release`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc

from tests.fakes.gpu_inference import FakeInference
from tests.fakes.gpu_inspection import inspect_rows
from tests.fakes.gpu_refusal import Refusal, refuse
from tests.fakes.run_script import (
    NUM_STEPS,
    artifact_files,
    checkpoint_payload,
    closing_payloads,
    file_references,
    opening_payloads,
    step_payload,
)
from tunesmith.common.v1 import errors_pb2, event_pb2, file_pb2, plan_pb2
from tunesmith.gpu.v1 import (
    blob_service_pb2,
    blob_service_pb2_grpc,
    inference_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
)

MODEL = "org/tiny"
WEIGHTS_DIGEST = "a" * 64
_OVER = (
    event_pb2.RUN_STATE_SUCCEEDED,
    event_pb2.RUN_STATE_FAILED,
    event_pb2.RUN_STATE_CANCELLED,
    event_pb2.RUN_STATE_INTERRUPTED,
)


@dataclass
class FakeRun:
    """One attempt and its journal."""

    run: run_service_pb2.Run
    spec: Any
    resume_step: int = 0
    journal: list[event_pb2.EncodedEvent] = field(default_factory=list)
    stop_mode: int = run_service_pb2.STOP_MODE_UNSPECIFIED
    task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.run.state in _OVER


class FakeGpuNode(FakeInference, run_service_pb2_grpc.RunServiceServicer, blob_service_pb2_grpc.BlobServiceServicer):
    """Start with `await start()`; `address` says where. `stop()` ends the server and keeps runs and blobs."""

    def __init__(self, *, name: str = "fake", num_steps: int = NUM_STEPS) -> None:
        super().__init__()
        self.name = name
        self.num_steps = num_steps
        self.hold_at_step: int | None = None
        # True: a blob's first chunk is sent and no more.
        self.hold_reads = False
        # True: no plan is answered.
        self.hold_plans = False
        self.plan_refusal: Refusal | None = None
        self.inspect_refusal: Refusal | None = None
        self.inspected: list[run_service_pb2.InspectDatasetRequest] = []
        # More rendered rows would not fit an answer.
        self.most_rows_shown = 100
        self.start_refusal: Refusal | None = None
        self.blobs: dict[str, bytes] = {}
        self.runs: dict[tuple[str, int], FakeRun] = {}
        self.started: list[run_service_pb2.StartRunRequest] = []
        self.released: list[tuple[str, int]] = []
        self.server_options: Sequence[tuple[str, int]] = (
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        )
        self.port = 0
        self.num_node_watchers = 0
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None
        self._instance = 0
        self._unwatched = asyncio.Event()
        self._num_changes = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Serves, on the same port as before if there was one."""
        self._instance += 1
        self._server = grpc.aio.server(options=self.server_options)
        run_service_pb2_grpc.add_RunServiceServicer_to_server(self, self._server)
        blob_service_pb2_grpc.add_BlobServiceServicer_to_server(self, self._server)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Ends the server; runs go on, as behind their shims."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def close(self) -> None:
        """Ends everything."""
        await self.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def release(self) -> None:
        """Lets held runs go on."""
        self.hold_at_step = None
        await self._wake()

    async def let_on(self, step: int) -> None:
        """Holds runs at this step from now on."""
        self.hold_at_step = step
        await self._wake()

    async def until_unwatched(self) -> None:
        """Waits until nobody has a stream of reports."""
        await self._unwatched.wait()

    # RunService

    async def GetCapabilities(self, request: Any, context: Any) -> Any:
        entry = run_service_pb2.CatalogEntry
        return run_service_pb2.GetCapabilitiesResponse(
            node_name=self.name,
            instance_id=f"{self.name}-{self._instance}",
            devices=[self._device()],
            models=[
                run_service_pb2.NodeModel(
                    name=MODEL,
                    config_type="llama",
                    weights_digest=WEIGHTS_DIGEST,
                    size_bytes=1000,
                    num_parameters=500,
                    vocabulary_size=256,
                    has_chat_template=True,
                )
            ],
            quantizations=[entry(id="nf4"), entry(id="none")],
            training_types=[entry(id="qlora"), entry(id="lora"), entry(id="full")],
            dataset_formats=[entry(id="chat-messages"), entry(id="prompt-completion"), entry(id="text")],
            model_types=[entry(id="llama", description="Llama", details={"config_types": "llama"})],
            versions={"torch": "0"},
        )

    async def PlanRun(self, request: Any, context: Any) -> Any:
        await self._wait(lambda: not self.hold_plans)
        await refuse(context, self.plan_refusal)
        plan = plan_pb2.Plan(
            level=request.level, training_type=request.spec.training_type, num_steps=self.num_steps, device="cpu"
        )
        return run_service_pb2.PlanRunResponse(plan=plan)

    async def InspectDataset(self, request: Any, context: Any) -> Any:
        """Every word is a token; in a row, what follows the first word carries loss."""
        self.inspected.append(request)
        await self._wait(lambda: not self.hold_plans)
        await refuse(context, self.inspect_refusal)
        if request.base_model != MODEL:
            await refuse(context, Refusal(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_FOUND"))
        if request.dataset.sha256 not in self.blobs:
            await refuse(context, Refusal(grpc.StatusCode.FAILED_PRECONDITION, "BLOB_NOT_FOUND"))
        answer = inspect_rows(self.blobs[request.dataset.sha256], request)
        del answer.rows[self.most_rows_shown :]
        return answer

    async def StartRun(self, request: Any, context: Any) -> Any:
        key = (request.key.job_id, request.key.attempt)
        newest = max((attempt for job_id, attempt in self.runs if job_id == key[0]), default=0)
        if key[1] < newest:
            await refuse(context, Refusal(grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH"))
        if key not in self.runs:
            await refuse(context, self.start_refusal)
            missing = [dataset.sha256 for dataset in request.spec.datasets if dataset.sha256 not in self.blobs]
            if missing:
                await refuse(
                    context,
                    Refusal(grpc.StatusCode.FAILED_PRECONDITION, "BLOB_NOT_FOUND", metadata={"sha256": missing[0]}),
                )
            self.started.append(request)
            run = run_service_pb2.Run(
                key=request.key,
                spec_digest=request.spec_digest,
                state=event_pb2.RUN_STATE_ACCEPTED,
                weights_digest=WEIGHTS_DIGEST,
            )
            self.runs[key] = FakeRun(run=run, spec=request.spec, resume_step=request.resume_from.step)
            task = self.runs[key].task = asyncio.create_task(self._play(self.runs[key]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self.runs[key].run.spec_digest != request.spec_digest:
            await refuse(context, Refusal(grpc.StatusCode.ALREADY_EXISTS, "RUN_CONFLICT"))
        return run_service_pb2.StartRunResponse(run=self.runs[key].run)

    async def GetRun(self, request: Any, context: Any) -> Any:
        return run_service_pb2.GetRunResponse(run=(await self._run(request.key, context)).run)

    async def ListRuns(self, request: Any, context: Any) -> Any:
        return run_service_pb2.ListRunsResponse(runs=[fake.run for fake in self.runs.values()])

    async def StopRun(self, request: Any, context: Any) -> Any:
        fake = await self._run(request.key, context)
        if not fake.is_over and not fake.stop_mode:
            fake.stop_mode = request.mode
            fake.run.state = event_pb2.RUN_STATE_STOPPING
            await self._wake()
        return run_service_pb2.StopRunResponse(run=fake.run)

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[Any]:
        fake = await self._run(request.key, context)
        position = request.after_run_sequence
        while True:
            events = fake.journal[position:]
            if events:
                position += len(events)
                yield run_service_pb2.WatchRunResponse(events=events)
            elif fake.is_over:
                return
            else:
                await self._wait(lambda after=position: len(fake.journal) > after or fake.is_over)

    async def WatchNode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.num_node_watchers += 1
        self._unwatched.clear()
        try:
            while True:
                seen = self._num_changes
                yield run_service_pb2.WatchNodeResponse(
                    node_name=self.name,
                    instance_id=f"{self.name}-{self._instance}",
                    devices=[self._device()],
                    runs=[fake.run for fake in self.runs.values()],
                    accepting=all(fake.is_over for fake in self.runs.values()),
                    resident_base_model=MODEL if self.runs else "",
                )
                # A heartbeat is due when nothing changed.
                with suppress(TimeoutError):
                    async with asyncio.timeout(request.heartbeat_seconds or 5):
                        await self._wait(lambda seen=seen: self._num_changes != seen)
        finally:
            self.num_node_watchers -= 1
            # No await here: this may be the end of a cancelled call.
            if not self.num_node_watchers:
                self._unwatched.set()

    async def ReleaseRun(self, request: Any, context: Any) -> Any:
        key = (request.key.job_id, request.key.attempt)
        if key in self.runs and not self.runs[key].is_over:
            await refuse(context, Refusal(grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE"))
        if self.runs.pop(key, None) is not None:
            self.released.append(key)
            await self._wake()
        return run_service_pb2.ReleaseRunResponse(freed_bytes=1)

    # BlobService

    async def FindMissingBlobs(self, request: Any, context: Any) -> Any:
        missing = [blob_service_pb2.MissingBlob(sha256=sha256) for sha256 in request.sha256 if sha256 not in self.blobs]
        return blob_service_pb2.FindMissingBlobsResponse(missing=missing)

    async def WriteBlob(self, requests: Any, context: Any) -> Any:
        sha256, content = "", bytearray()
        async for request in requests:
            sha256 = sha256 or request.sha256
            content += request.chunk
        if hashlib.sha256(content).hexdigest() != sha256:
            await refuse(context, Refusal(grpc.StatusCode.INVALID_ARGUMENT, "CHECKSUM_MISMATCH"))
        self.blobs[sha256] = bytes(content)
        return blob_service_pb2.WriteBlobResponse(stored_bytes=len(content))

    async def ReadBlob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if request.sha256 not in self.blobs:
            await refuse(context, Refusal(grpc.StatusCode.NOT_FOUND, "BLOB_NOT_FOUND"))
        content = self.blobs[request.sha256][request.offset :]
        for start in range(0, len(content), 1024):
            yield blob_service_pb2.ReadBlobResponse(chunk=content[start : start + 1024])
            await self._wait(lambda: not self.hold_reads)

    # The run

    async def _play(self, fake: FakeRun) -> None:
        for payload in opening_payloads(num_steps=self.num_steps, resume_step=fake.resume_step):
            await self._append(fake, payload)
        for step in range(fake.resume_step + 1, self.num_steps + 1):
            await self._wait(
                lambda step=step: bool(fake.stop_mode) or self.hold_at_step is None or step <= self.hold_at_step
            )
            if fake.stop_mode:
                break
            await self._append(fake, step_payload(step, num_steps=self.num_steps))
        if not fake.stop_mode:
            for name, files in artifact_files(fake.run.key.job_id).items():
                references = self._store(files)
                kind = event_pb2.ArtifactKind.Value(f"ARTIFACT_KIND_{name.upper()}")
                fake.run.artifacts.add(name=name, kind=kind, files=references)
                await self._append(
                    fake,
                    event_pb2.EventPayload(artifact=event_pb2.ArtifactEvent(name=name, kind=kind, files=references)),
                )
        for payload in closing_payloads(stop_mode=fake.stop_mode, last_step=self._last_step(fake)):
            await self._append(fake, payload)

    def _last_step(self, fake: FakeRun) -> int:
        kinds = [event for event in fake.journal if event.kind == event_pb2.EVENT_KIND_STEP]
        return event_pb2.EventPayload.FromString(kinds[-1].payload).step.step if kinds else fake.resume_step

    async def _append(self, fake: FakeRun, payload: event_pb2.EventPayload) -> None:
        which = payload.WhichOneof("kind")
        assert which is not None
        event = event_pb2.EncodedEvent(
            attempt=fake.run.key.attempt,
            run_sequence=len(fake.journal) + 1,
            kind=event_pb2.EventKind.Value(f"EVENT_KIND_{which.upper()}"),
            payload=payload.SerializeToString(),
        )
        event.time.FromDatetime(datetime.now(UTC))
        fake.journal.append(event)
        fake.run.last_run_sequence = event.run_sequence
        if which == "run_state":
            fake.run.state = payload.run_state.state
        elif which == "phase":
            fake.run.phase = payload.phase.phase
        elif which == "checkpoint":
            fake.run.last_checkpoint = payload.checkpoint.name
            fake.run.last_checkpoint_step = payload.checkpoint.step
        await self._wake()

    async def checkpoint(self, job_id: str, step: int, files: Mapping[str, bytes]) -> None:
        """A checkpoint of the job's first attempt, with its bytes."""
        await self._append(self.runs[job_id, 1], checkpoint_payload(step, self._store(files)))

    def _store(self, files: Mapping[str, bytes]) -> list[file_pb2.FileReference]:
        self.blobs |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return file_references(files)

    async def fail(self, job_id: str, attempt: int, failure: errors_pb2.Failure) -> None:
        """Ends a run by a typed failure, as a shim does for a dead engine."""
        fake = self.runs[(job_id, attempt)]
        assert fake.task is not None
        fake.task.cancel()
        await asyncio.gather(fake.task, return_exceptions=True)
        state = event_pb2.RunStateEvent(
            previous_state=event_pb2.RUN_STATE_RUNNING, state=event_pb2.RUN_STATE_FAILED, failure=failure
        )
        await self._append(fake, event_pb2.EventPayload(run_state=state))

    def _device(self) -> run_service_pb2.Device:
        return run_service_pb2.Device(
            index=-1, type="cpu", name="cpu", total_memory_bytes=2**30, free_memory_bytes=2**29
        )

    async def _run(self, key: Any, context: Any) -> FakeRun:
        if (key.job_id, key.attempt) not in self.runs:
            await refuse(context, Refusal(grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"))
        return self.runs[(key.job_id, key.attempt)]

    async def _wake(self) -> None:
        self._num_changes += 1
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, condition: Any) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)
