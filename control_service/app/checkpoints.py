"""Forgets a checkpoint that turned out not to be whole where a job was to go on from it. Deletes no bytes."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from control_service.app.ports import EventCodec
from control_service.app.store_ports import Transaction
from control_service.app.transitions import append_facts, checkpoint_fact
from control_service.domain.artifact import CheckpointStatus
from control_service.domain.event import ControlFact, WarningFact
from control_service.domain.job import Job


def forget_checkpoint(tx: Transaction, job: Job, name: str, *, codec: EventCodec, now: datetime) -> None:
    """The job's node does not have this checkpoint, or not whole: from now on control's copy stands for it.

    Where control has none, or the node was given it, the checkpoint is DELETED, and the log says so; and when none is
    left, that training begins anew.
    """
    facts: list[ControlFact] = []
    for known in tx.checkpoints.list_for_job(job.job_id):
        if known.name != name:
            continue
        if known.status is CheckpointStatus.REPLICATED and known.node == job.node:
            tx.checkpoints.put(replace(known, node=""))
        elif known.status is not CheckpointStatus.DELETED:
            tx.checkpoints.put(replace(known, node="", status=CheckpointStatus.DELETED))
            facts.append(checkpoint_fact(known, CheckpointStatus.DELETED))
    left = [known for known in tx.checkpoints.list_for_job(job.job_id) if known.status is not CheckpointStatus.DELETED]
    if facts and not left:
        message = f"{name} cannot be gone on from and no other checkpoint is left: training begins at the first step"
        facts.append(WarningFact(code="no-checkpoint-left", message=message))
    append_facts(tx, job, facts, codec=codec, now=now)
