"""Serves `JobService`: wire in, use case, wire out. Watches give pages that are encoded already."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from control_service.api.deadline import seconds_for_nodes
from control_service.api.dependencies import Dependencies
from control_service.api.paging import cut_page, page_limit
from control_service.api.requests import request_key
from control_service.api.wire.artifacts import checkpoint_message
from control_service.api.wire.jobs import (
    event_message,
    job_listing_message,
    job_message,
    job_states,
    plan_level,
    plan_message,
    start_request,
)
from control_service.app import jobs, training
from control_service.domain.errors import ResourceExhausted
from tunesmith.control.v1 import job_service_pb2 as messages
from tunesmith.control.v1 import job_service_pb2_grpc

DEFAULT_EVENTS: Final = 100
DEFAULT_MAX_RETRIES: Final = 2


class JobServicer(job_service_pb2_grpc.JobServiceServicer):
    """Jobs, towards clients."""

    def __init__(self, dependencies: Dependencies) -> None:
        self._on = dependencies
        self._num_watches = 0

    async def PlanTraining(self, request: messages.PlanTrainingRequest, context: Any) -> Any:
        """Resolves a project on a node, without training."""
        result = await training.plan_training(
            request.project_id,
            level=plan_level(request.level),
            probe_memory=request.probe_memory,
            timeout_seconds=seconds_for_nodes(context),
            store=self._on.store,
            nodes=self._on.nodes,
            blobs=self._on.blobs,
            clock=self._on.clock,
        )
        return messages.PlanTrainingResponse(plan=plan_message(result.plan), node=result.node)

    async def StartTraining(self, request: messages.StartTrainingRequest, context: Any) -> Any:
        """Stores a job in state QUEUED."""
        view = await training.start_training(
            request.project_id,
            priority=request.priority,
            max_retries=request.max_retries if request.HasField("max_retries") else DEFAULT_MAX_RETRIES,
            start=start_request(request),
            timeout_seconds=seconds_for_nodes(context),
            store=self._on.store,
            nodes=self._on.nodes,
            queue=self._on.queue,
            clock=self._on.clock,
            ids=self._on.ids,
            codec=self._on.codec,
            request=request_key(request, method="StartTraining"),
        )
        return messages.StartTrainingResponse(job=job_message(view))

    async def GetJob(self, request: messages.GetJobRequest, context: Any) -> Any:
        """Reads one job."""
        view = await jobs.get_job(request.job_id, store=self._on.store, queue=self._on.queue)
        return messages.GetJobResponse(job=job_message(view))

    async def ListJobs(self, request: messages.ListJobsRequest, context: Any) -> Any:
        """Lists jobs, newest first, without their specs."""
        filters = {"project_id": request.project_id, "states": sorted(request.states)}
        before_job_id = self._on.pages.decode(request.page_token, listing="jobs", filters=filters)
        found = await jobs.list_jobs(
            store=self._on.store,
            queue=self._on.queue,
            before_job_id=before_job_id,
            limit=page_limit(request.page_size),
            project_id=request.project_id,
            states=job_states(request.states),
        )
        page, following = cut_page(
            found, page_size=request.page_size, to_message=job_listing_message, position=lambda view: view.job.job_id
        )
        return messages.ListJobsResponse(
            jobs=page,
            next_page_token=self._on.pages.encode(following, listing="jobs", filters=filters),
        )

    async def CancelJob(self, request: messages.CancelJobRequest, context: Any) -> Any:
        """Asks for the end of a job."""
        view = await jobs.cancel_job(
            request.job_id,
            store=self._on.store,
            queue=self._on.queue,
            clock=self._on.clock,
            codec=self._on.codec,
            request=request_key(request, method="CancelJob"),
        )
        return messages.CancelJobResponse(job=job_message(view))

    async def PauseJob(self, request: messages.PauseJobRequest, context: Any) -> Any:
        """Asks a running job to checkpoint and free its device."""
        view = await jobs.pause_job(
            request.job_id,
            store=self._on.store,
            queue=self._on.queue,
            clock=self._on.clock,
            codec=self._on.codec,
            request=request_key(request, method="PauseJob"),
        )
        return messages.PauseJobResponse(job=job_message(view))

    async def ResumeJob(self, request: messages.ResumeJobRequest, context: Any) -> Any:
        """Queues a paused job again."""
        view = await jobs.resume_job(
            request.job_id,
            store=self._on.store,
            queue=self._on.queue,
            clock=self._on.clock,
            codec=self._on.codec,
            request=request_key(request, method="ResumeJob"),
        )
        return messages.ResumeJobResponse(job=job_message(view))

    async def RetryJob(self, request: messages.RetryJobRequest, context: Any) -> Any:
        """Queues a new job with the snapshot of one that failed or was cancelled."""
        view = await training.retry_job(
            request.job_id,
            store=self._on.store,
            queue=self._on.queue,
            clock=self._on.clock,
            ids=self._on.ids,
            codec=self._on.codec,
            request=request_key(request, method="RetryJob"),
        )
        return messages.RetryJobResponse(job=job_message(view))

    async def DeleteJob(self, request: messages.DeleteJobRequest, context: Any) -> Any:
        """Deletes a job that is over, with its log and artifacts."""
        await jobs.delete_job(
            request.job_id,
            store=self._on.store,
            blobs=self._on.blobs,
            clock=self._on.clock,
            request=request_key(request, method="DeleteJob"),
        )
        return messages.DeleteJobResponse()

    async def WatchJob(self, request: messages.WatchJobRequest, context: Any) -> AsyncIterator[Any]:
        """Streams serialized WatchJobResponses; `registration` takes the serializer away from this method."""
        if self._num_watches >= self._on.config.max_watches:
            raise ResourceExhausted(
                "TOO_MANY_REQUESTS", f"{self._num_watches} watches are open already", retry_after_seconds=5.0
            )
        self._num_watches += 1
        try:
            pages: Any = self._on.hub.watch(request.job_id, after_sequence=request.after_sequence)
            async with aclosing(pages):
                async for page in pages:
                    yield page
        finally:
            self._num_watches -= 1

    async def ListJobEvents(self, request: messages.ListJobEventsRequest, context: Any) -> Any:
        """Reads a page of events after a sequence; fewer when they are large."""
        page = await jobs.list_job_events(
            request.job_id,
            store=self._on.store,
            after_sequence=request.after_sequence,
            limit=request.page_size or DEFAULT_EVENTS,
        )
        events, _ = cut_page(
            page.events,
            page_size=len(page.events),
            to_message=event_message,
            position=lambda event: str(event.sequence),
        )
        return messages.ListJobEventsResponse(events=events, last_sequence=page.last_sequence)

    async def ListCheckpoints(self, request: messages.ListCheckpointsRequest, context: Any) -> Any:
        """Lists a job's checkpoints by step."""
        found = await jobs.list_checkpoints(request.job_id, store=self._on.store)
        return messages.ListCheckpointsResponse(checkpoints=[checkpoint_message(checkpoint) for checkpoint in found])
