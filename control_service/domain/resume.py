"""Which checkpoint an attempt goes on from, and whether it may go on elsewhere. Moves no bytes."""

from __future__ import annotations

from collections.abc import Sequence

from control_service.domain.artifact import Checkpoint, CheckpointStatus
from control_service.domain.run import ResumeFrom


def bound_node(checkpoints: Sequence[Checkpoint]) -> str:
    """The only node from which the newest checkpoint can be read; empty when there is none or control has one."""
    kept = _kept(checkpoints)
    if not kept or any(checkpoint.status is CheckpointStatus.REPLICATED for checkpoint in kept):
        return ""
    return kept[-1].node


def resume_from(checkpoints: Sequence[Checkpoint], node: str) -> ResumeFrom | None:
    """What an attempt on this node goes on from: the newest checkpoint that lies there or in control's store."""
    for checkpoint in reversed(_kept(checkpoints)):
        if checkpoint.node == node:
            return ResumeFrom(checkpoint=checkpoint.name, step=checkpoint.step, attempt=checkpoint.attempt)
        if checkpoint.status is CheckpointStatus.REPLICATED:
            return ResumeFrom(
                checkpoint=checkpoint.name,
                step=checkpoint.step,
                attempt=checkpoint.attempt,
                files=checkpoint.files,
            )
    return None


def _kept(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    kept = [checkpoint for checkpoint in checkpoints if checkpoint.status is not CheckpointStatus.DELETED]
    return sorted(kept, key=lambda checkpoint: checkpoint.step)
