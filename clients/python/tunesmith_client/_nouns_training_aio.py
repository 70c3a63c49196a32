"""Jobs and artifacts for an asyncio client. Builds requests; calls go through the AsyncCaller.

Every method raises TunesmithError's subclasses as the service's RPC comments say. Mutating methods take a request_id;
when it is left out one is made, so that repeats after a lost connection are safe.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

import grpc

from tunesmith.common.v1 import event_pb2, file_pb2, plan_pb2
from tunesmith.control.v1 import (
    artifact_service_pb2,
    artifact_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
)
from tunesmith_client._caller_aio import AsyncCaller
from tunesmith_client._config import DEFAULT_DEADLINE_SECONDS, MEMORY_PROBE_SECONDS, PAGE_SIZE
from tunesmith_client._cursor import Cursor
from tunesmith_client._errors import NotFound
from tunesmith_client._outcome import job_result
from tunesmith_client._transfer import (
    PartFile,
    ProgressCallback,
    destination_of,
    ignore_progress,
    upload_seconds,
)
from tunesmith_client._watch_aio import watch


class AsyncJobs:
    """Requests to train."""

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        self._stub: job_service_pb2_grpc.JobServiceAsyncStub = job_service_pb2_grpc.JobServiceStub(channel)
        self._caller = caller
        self._config = caller.config
        self._call = caller.call

    async def plan(
        self,
        project_id: int,
        *,
        level: "plan_pb2.PlanLevel.ValueType" = plan_pb2.PLAN_LEVEL_EXACT,
        probe_memory: bool = False,
    ) -> job_service_pb2.PlanTrainingResponse:
        """Resolves everything without training. The answer has `plan` and the `node` that planned. With `probe_memory`
        the node loads the base in a process of its own and measures two steps: the plan has `memory_probe`, or the call
        raises ResourceExhausted (NODE_BUSY) or TunesmithError (MEMORY_PROBE)."""
        request = job_service_pb2.PlanTrainingRequest(project_id=project_id, level=level, probe_memory=probe_memory)
        seconds = MEMORY_PROBE_SECONDS if probe_memory else DEFAULT_DEADLINE_SECONDS
        return await self._call(self._stub.PlanTraining, request, default_seconds=seconds)

    async def start(
        self,
        project_id: int,
        *,
        priority: int = 0,
        max_retries: int | None = None,
        from_job_id: str = "",
        from_checkpoint: str = "",
        request_id: str = "",
    ) -> job_service_pb2.Job:
        """Stores a job, QUEUED. The same request_id gives the same job.

        `from_job_id`: begin with what that job trained, or with a checkpoint of it, and a fresh optimizer.
        """
        request = job_service_pb2.StartTrainingRequest(
            project_id=project_id,
            priority=priority,
            max_retries=max_retries,
            start_from_job_id=from_job_id,
            start_from_checkpoint=from_checkpoint,
            request_id=request_id,
        )
        return (await self._call(self._stub.StartTraining, request)).job

    async def get(self, job_id: str) -> job_service_pb2.Job:
        """Reads one job with its queue position and why it waits."""
        return (await self._call(self._stub.GetJob, job_service_pb2.GetJobRequest(job_id=job_id))).job

    async def list(
        self,
        *,
        project_id: int = 0,
        states: "Iterable[event_pb2.JobState.ValueType]" = (),
    ) -> AsyncIterator[job_service_pb2.Job]:
        """Jobs, newest first, without their specs, fetched page by page while you iterate."""
        request = job_service_pb2.ListJobsRequest(page_size=PAGE_SIZE, project_id=project_id, states=list(states))
        while True:
            page = await self._call(self._stub.ListJobs, request)
            for item in page.jobs:
                yield item
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel(self, job_id: str, *, request_id: str = "") -> job_service_pb2.Job:
        """Asks for the end of a job; one that is over is answered as it is."""
        request = job_service_pb2.CancelJobRequest(job_id=job_id, request_id=request_id)
        return (await self._call(self._stub.CancelJob, request)).job

    async def pause(self, job_id: str, *, request_id: str = "") -> job_service_pb2.Job:
        """Asks a running job to checkpoint and free its device."""
        request = job_service_pb2.PauseJobRequest(job_id=job_id, request_id=request_id)
        return (await self._call(self._stub.PauseJob, request)).job

    async def resume(self, job_id: str, *, request_id: str = "") -> job_service_pb2.Job:
        """Queues a paused job again."""
        request = job_service_pb2.ResumeJobRequest(job_id=job_id, request_id=request_id)
        return (await self._call(self._stub.ResumeJob, request)).job

    async def retry(self, job_id: str, *, request_id: str = "") -> job_service_pb2.Job:
        """Starts a new job with the snapshot of one that failed or was cancelled."""
        request = job_service_pb2.RetryJobRequest(job_id=job_id, request_id=request_id)
        return (await self._call(self._stub.RetryJob, request)).job

    async def delete(self, job_id: str, *, request_id: str = "") -> None:
        """Deletes a job that is over, with its log and artifacts."""
        request = job_service_pb2.DeleteJobRequest(job_id=job_id, request_id=request_id)
        await self._call(self._stub.DeleteJob, request)

    def watch(self, job_id: str, *, after_sequence: int = 0) -> AsyncIterator[event_pb2.Event]:
        """Iterates the job's events, history first, each once and in order, until it is over; reconnects itself."""
        cursor = Cursor(job_id=job_id, after_sequence=after_sequence, config=self._config)
        # A watch has no deadline: the silence limit notices a server that hangs.
        return watch(
            lambda request: self._stub.WatchJob(request),
            cursor,
            limit_seconds=self._config.silence_limit_seconds,
            is_closed=lambda: self._caller.is_closed,
        )

    async def events(self, job_id: str, *, after_sequence: int = 0) -> AsyncIterator[event_pb2.Event]:
        """The events written so far, page by page; does not wait for more."""
        while True:
            request = job_service_pb2.ListJobEventsRequest(
                job_id=job_id, after_sequence=after_sequence, page_size=PAGE_SIZE
            )
            page = await self._call(self._stub.ListJobEvents, request)
            for item in page.events:
                yield item
            if not page.events or page.events[-1].sequence >= page.last_sequence:
                return
            after_sequence = page.events[-1].sequence

    async def checkpoints(self, job_id: str) -> Sequence[job_service_pb2.Checkpoint]:
        """The job's checkpoints by step."""
        request = job_service_pb2.ListCheckpointsRequest(job_id=job_id)
        return (await self._call(self._stub.ListCheckpoints, request)).checkpoints

    async def wait(
        self, job_id: str, *, check: bool = True, on_event: Callable[[event_pb2.Event], object] | None = None
    ) -> job_service_pb2.Job:
        """Watches until the job is over and gives it. With `check`, raises JobFailed unless it SUCCEEDED."""
        async for event in self.watch(job_id):
            if on_event is not None:
                on_event(event)
        return job_result(await self.get(job_id), check=check)


class AsyncArtifacts:
    """What jobs left."""

    def __init__(self, channel: grpc.aio.Channel, caller: AsyncCaller) -> None:
        self._stub: artifact_service_pb2_grpc.ArtifactServiceAsyncStub = artifact_service_pb2_grpc.ArtifactServiceStub(
            channel
        )
        self._caller = caller
        self._call = caller.call

    async def list(self, job_id: str) -> Sequence[artifact_service_pb2.Artifact]:
        """A job's collected artifacts."""
        return (
            await self._call(self._stub.ListArtifacts, artifact_service_pb2.ListArtifactsRequest(job_id=job_id))
        ).artifacts

    async def get(self, job_id: str, name: str) -> artifact_service_pb2.Artifact:
        """The artifact of this name. NotFound when there is none."""
        for artifact in await self.list(job_id):
            if artifact.name == name:
                return artifact
        message = f"job {job_id} has no artifact {name!r}"
        raise NotFound(message, reason="ARTIFACT_NOT_FOUND", code=grpc.StatusCode.NOT_FOUND)

    async def download(
        self, job_id: str, name: str, directory: str | Path, *, progress: ProgressCallback = ignore_progress
    ) -> Sequence[Path]:
        """Downloads every file of an artifact into `directory`, verified by SHA-256; what is there already stays.

        An interrupted download leaves `<file>.part` and goes on from there next time. Raises TransferDamaged.
        """
        artifact = await self.get(job_id, name)
        targets = [(destination_of(Path(directory), file), file) for file in artifact.files]
        return [await self._download_file(artifact, file, target, progress) for target, file in targets]

    async def export(
        self, job_id: str, format: str, *, max_logit_difference: float | None = None, request_id: str = ""
    ) -> job_service_pb2.Job:
        """Queues a job that writes what a finished job trained in another form (`merged`), and gives that job."""
        request = artifact_service_pb2.ExportArtifactRequest(
            job_id=job_id, format=format, max_logit_difference=max_logit_difference, request_id=request_id
        )
        return (await self._call(self._stub.ExportArtifact, request)).job

    async def delete(self, job_id: str, name: str, *, request_id: str = "") -> None:
        """Deletes an artifact's bytes and record."""
        request = artifact_service_pb2.DeleteArtifactRequest(job_id=job_id, name=name, request_id=request_id)
        await self._call(self._stub.DeleteArtifact, request)

    async def _download_file(
        self,
        artifact: artifact_service_pb2.Artifact,
        file: file_pb2.FileReference,
        target: Path,
        progress: ProgressCallback,
    ) -> Path:
        part = PartFile(target, file, progress)
        if await asyncio.to_thread(part.is_there):
            return target
        ends_at = time.monotonic() + upload_seconds(file.size_bytes)

        async def fetch_rest() -> None:
            request = artifact_service_pb2.DownloadArtifactRequest(
                job_id=artifact.job_id, name=artifact.name, path=file.path, offset=part.offset
            )
            timeout = max(0.001, ends_at - time.monotonic())
            async for response in self._stub.DownloadArtifact(request, timeout=timeout):
                await asyncio.to_thread(part.write, response.chunk)

        await asyncio.to_thread(part.open)
        try:
            if part.offset < file.size_bytes:
                await self._caller.repeat(fetch_rest, ends_at=ends_at)
            return await asyncio.to_thread(part.finish)
        finally:
            part.close()
