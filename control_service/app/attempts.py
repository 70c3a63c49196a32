"""Starts the current attempt of a job on its node: pushes what the node lacks, then StartRun. Does nothing twice: the
same request again is the same run."""

from __future__ import annotations

from datetime import timedelta

import structlog

from control_service.app.blob_push import blobs_of_spec, push_missing_blobs
from control_service.app.checkpoints import forget_checkpoint
from control_service.app.node_monitor import NodeMonitor
from control_service.app.placing import send_elsewhere
from control_service.app.ports import BlobStore, Clock, EventCodec, NodeClient, StartRun
from control_service.app.settle import Settler
from control_service.app.store_ports import Store, Transaction
from control_service.app.transitions import append_facts, change_state
from control_service.domain import retry
from control_service.domain.errors import DeadlineTooShort, InvalidArgument, TunesmithError, Unavailable
from control_service.domain.event import WarningFact
from control_service.domain.failpoints import failpoint
from control_service.domain.failure import Failure, Fault
from control_service.domain.job import Job, JobProgress
from control_service.domain.job_state import JobState
from control_service.domain.reconcile import Settle, after_failure
from control_service.domain.resume import resume_from
from control_service.domain.run import ObservedRun, ResumeFrom

_log = structlog.get_logger(__name__)

# In the details of a refusal whose RetryInfo is not that of every refusal with its reason.
_RETRY_DETAIL = "retry_after_seconds"
# The node takes no run just now; the job goes back to the queue and nothing is counted.
_NOT_NOW: frozenset[str] = frozenset({"NODE_BUSY", "NODE_DRAINING", "STALE_EPOCH", "RUN_CONFLICT", "DISK_FULL"})
# The node knows attempts that control's record does not: it was restored from a backup. The next one goes above them.
_KNOWS_MORE: frozenset[str] = frozenset({"STALE_EPOCH", "RUN_CONFLICT"})

# What the attempt was to go on from is not on the node, or not whole.
_DAMAGED = "RESUME_MISMATCH"
_NOT_THERE: frozenset[str] = frozenset({"CHECKPOINT_NOT_FOUND", _DAMAGED})


class AttemptStarter:
    """Stateless but for its ports."""

    def __init__(
        self,
        *,
        store: Store,
        nodes: NodeMonitor,
        blobs: BlobStore,
        codec: EventCodec,
        clock: Clock,
        settler: Settler,
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._blobs = blobs
        self._codec = codec
        self._clock = clock
        self._settler = settler

    async def start(self, job: Job, client: NodeClient) -> None:
        """Starts the attempt and stores what came of it. Unavailable when the node did not answer: ask it again."""
        checkpoints = await self._store.read(lambda tx: tx.checkpoints.list_for_job(job.job_id))
        resume = resume_from(checkpoints, job.node)
        request = StartRun(
            key=job.run_key(self._store.installation_id),
            spec=job.spec,
            spec_digest=job.spec_digest,
            weights_digest=job.weights_digest,
            resume_from=resume,
        )
        try:
            await push_missing_blobs(client, self._blobs, blobs_of_spec(job.spec))
            if resume is not None:
                await push_missing_blobs(client, self._blobs, resume.files)
            failpoint("dispatch.before-start-run")
            run = await client.start_run(request)
            failpoint("dispatch.after-start-run")
        except (Unavailable, DeadlineTooShort):
            raise
        except TunesmithError as error:
            if resume is not None and error.reason in _NOT_THERE:
                # The keeper starts it again, from what is left.
                await self._forget_on_node(job, resume, error)
            else:
                await self._refused(job, error)
            return
        await self.mark_running(job, run)

    async def mark_running(self, job: Job, run: ObservedRun | None) -> None:
        """The node has the attempt: DISPATCHING becomes RUNNING."""
        now = self._clock.utc_now()

        def work(tx: Transaction) -> None:
            current = tx.jobs.get(job.job_id)
            if current is None or current.attempt != job.attempt or current.state is not JobState.DISPATCHING:
                return
            change_state(
                tx,
                current,
                JobState.RUNNING,
                codec=self._codec,
                now=now,
                keep_failure=current.run_state is not None,
                # What an earlier attempt had reached is not this one's; RESUMED and steps say where it is.
                progress=JobProgress(total_steps=current.progress.total_steps),
                start_time=current.start_time or max(now, current.create_time),
                weights_digest=current.weights_digest or (run.weights_digest if run else ""),
            )

        await self._store.transact(work)

    async def _forget_on_node(self, job: Job, resume: ResumeFrom, error: TunesmithError) -> None:
        """The node does not have the checkpoint that it was to go on from, or not whole; control may have a copy."""
        log = _log.bind(job_id=job.job_id, attempt=job.attempt, node=job.node)
        log.warning("checkpoint-not-on-node", checkpoint=resume.checkpoint, reason=error.reason, message=error.message)
        now = self._clock.utc_now()

        def work(tx: Transaction) -> None:
            current = tx.jobs.get(job.job_id)
            if current is None or current.attempt != job.attempt or current.state is not JobState.DISPATCHING:
                return
            if error.reason == _DAMAGED:
                warning = WarningFact(code="checkpoint-damaged", message=f"node {job.node}: {error.message}")
                append_facts(tx, current, [warning], codec=self._codec, now=now)
            forget_checkpoint(tx, current, resume.checkpoint, codec=self._codec, now=now)

        await self._store.transact(work)

    async def _refused(self, job: Job, error: TunesmithError) -> None:
        log = _log.bind(job_id=job.job_id, attempt=job.attempt, node=job.node)
        log.info("attempt-refused", reason=error.reason, message=error.message)
        if error.reason in _KNOWS_MORE:
            highest = int(error.details.get("highest_attempt", job.attempt))
            log.warning("node-knows-later-attempts", highest_attempt=highest)
            self._nodes.note_attempt(job.job_id, highest)
        if error.reason in _NOT_NOW:
            # A node that itself names the time lacks something that this job needs, and may have it for others.
            names_time = _RETRY_DETAIL in error.details
            if not names_time:
                self._nodes.mark_busy(job.node)
            knows_time = names_time or error.reason == "DISK_FULL"
            message = f"node {job.node}: {error.reason}"
            if knows_time:
                message += f": {error.message}"
            settle = Settle(state=JobState.QUEUED, message=message, keeps_failure=True)
            # A node knows how soon asking again may help: a disk does not get empty in a second.
            seconds = error.retry_after_seconds if knows_time else None
            pause = timedelta(seconds=seconds or retry.INITIAL_BACK_OFF_SECONDS)
            await self._settler.settle(job, settle, not_before=self._clock.steady_utc_now() + pause)
            return
        elsewhere = send_elsewhere(self._nodes, job, reason=error.reason, message=error.message)
        await self._settler.settle(job, elsewhere or after_failure(job, failure_of(error)))


def failure_of(error: TunesmithError) -> Failure:
    """A refusal as the failure of a job, with the same reason."""
    details = dict(error.details)
    stage = details.pop("stage", "")
    fault = details.pop("fault", "")
    guess = Fault.USER if isinstance(error, InvalidArgument) else Fault.PLATFORM
    known = Fault(fault) if fault in Fault.__members__ else guess
    return Failure(reason=error.reason, fault=known, message=error.message, stage=stage, details=details)
