"""Phase COLLECTING: copies the artifacts of a run that succeeded into control's store, verifies them, puts them below
the output root, and only then lets the job succeed. Waits for a node that is silent, but not for bytes that are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from control_service.app.content import all_are_there, naming
from control_service.app.fetch import fetch_files
from control_service.app.ports import BlobStore, Clock, EventCodec, NodeClient
from control_service.app.settle import Settler
from control_service.app.store_ports import Store, Transaction
from control_service.app.transitions import append_facts, change_state
from control_service.domain.artifact import Artifact
from control_service.domain.errors import NotFound, TunesmithError, Unavailable
from control_service.domain.event import ArtifactFact, EventKind, PhaseFact
from control_service.domain.failpoints import failpoint
from control_service.domain.failure import Failure, Fault
from control_service.domain.job import Job
from control_service.domain.job_state import JobState
from control_service.domain.reconcile import Settle
from control_service.domain.run import Phase, RunState

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class CollectorConfig:
    """How hard it tries when bytes come wrong."""

    num_tries: int = 3
    pause_seconds: float = 0.5


class Collector:
    """Stateless but for its ports: done again after a crash, it goes on with what is not there yet."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        codec: EventCodec,
        clock: Clock,
        settler: Settler,
        config: CollectorConfig,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._codec = codec
        self._clock = clock
        self._settler = settler
        self._config = config

    async def collect(self, job: Job, client: NodeClient) -> None:
        """Ends the job SUCCEEDED, or FAILED with COLLECTING or DISK_FULL. Unavailable: the node did not answer."""
        for tries_left in reversed(range(self._config.num_tries)):
            try:
                artifacts = await self._begin(job)
                await self._copy(job, client, artifacts)
                await self._succeed(job, artifacts)
            except Unavailable:
                raise
            except TunesmithError as error:
                _log.warning("collecting-failed", job_id=job.job_id, reason=error.reason, tries_left=tries_left)
                if tries_left:
                    await self._clock.sleep(self._config.pause_seconds)
                    continue
                failure = _failure_of(error)
                await self._settler.settle(job, Settle(state=JobState.FAILED, message=failure.reason, failure=failure))
            return

    async def _begin(self, job: Job) -> Sequence[ArtifactFact]:
        now = self._clock.utc_now()

        def work(tx: Transaction) -> Sequence[bytes]:
            current = tx.jobs.get(job.job_id)
            if current is not None and _is_same(current, job) and current.phase is not Phase.COLLECTING:
                tx.jobs.update(replace(current, phase=Phase.COLLECTING))
                append_facts(tx, current, [PhaseFact(phase=Phase.COLLECTING)], codec=self._codec, now=now)
            events = tx.events.of_kind(job.job_id, attempt=job.attempt, kind=EventKind.ARTIFACT)
            return [event.payload for event in events]

        payloads = await self._store.transact(work)
        facts = [self._codec.decode(EventKind.ARTIFACT, payload) for payload in payloads]
        return [fact for fact in facts if isinstance(fact, ArtifactFact) and not fact.collected]

    async def _copy(self, job: Job, client: NodeClient, artifacts: Sequence[ArtifactFact]) -> None:
        for fact in artifacts:
            await fetch_files(client, self._blobs, fact.files)
            failpoint("collect.before-output")
            await self._blobs.materialize(path=f"{job.output_path}/{fact.name}", files=fact.files)

    async def _succeed(self, job: Job, artifacts: Sequence[ArtifactFact]) -> None:
        now = self._clock.utc_now()

        def work(tx: Transaction) -> None:
            current = tx.jobs.get(job.job_id)
            if current is None or not _is_same(current, job):
                return
            for fact in artifacts:
                tx.artifacts.put(
                    Artifact(
                        job_id=job.job_id,
                        name=fact.name,
                        kind=fact.kind,
                        files=fact.files,
                        path=f"{job.output_path}/{fact.name}",
                        create_time=now,
                    )
                )
            collected = [replace(fact, collected=True) for fact in artifacts]
            append_facts(tx, current, collected, codec=self._codec, now=now)
            change_state(tx, current, JobState.SUCCEEDED, codec=self._codec, now=now, message="artifacts are collected")

        contents = {file.sha256 for fact in artifacts for file in fact.files}
        async with naming(self._blobs):
            if not await all_are_there(contents, blobs=self._blobs):
                raise NotFound("BLOB_NOT_FOUND", "content was deleted with another artifact while this one was copied")
            failpoint("collect.before-succeeded")
            await self._store.transact(work)
        _log.info("job-succeeded", job_id=job.job_id, attempt=job.attempt, num_artifacts=len(artifacts))


def _is_same(current: Job, job: Job) -> bool:
    return (
        current.attempt == job.attempt
        and current.run_state is RunState.SUCCEEDED
        and current.state in (JobState.RUNNING, JobState.PAUSING)
    )


def _failure_of(error: TunesmithError) -> Failure:
    # A full disk is said as such; everything else is that the bytes could not be had as they were promised.
    reason = "DISK_FULL" if error.reason == "DISK_FULL" else "COLLECTING"
    return Failure(
        reason=reason,
        fault=Fault.PLATFORM,
        message=error.message,
        stage="COLLECTING",
        file=error.details.get("file", ""),
        details={**error.details, "cause": error.reason},
    )
