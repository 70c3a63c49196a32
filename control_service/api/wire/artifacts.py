"""Artifacts and checkpoints on the wire."""

from __future__ import annotations

from control_service.domain.artifact import Artifact, Checkpoint
from control_service.wire.values import enum_number, file_messages, timestamp
from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import artifact_service_pb2, job_service_pb2


def artifact_message(artifact: Artifact) -> artifact_service_pb2.Artifact:
    """A collected artifact."""
    return artifact_service_pb2.Artifact(
        job_id=artifact.job_id,
        name=artifact.name,
        kind=enum_number(event_pb2.ArtifactKind, artifact.kind.value),
        files=file_messages(artifact.files),
        size_bytes=artifact.size_bytes,
        create_time=timestamp(artifact.create_time),
        path=artifact.path,
    )


def checkpoint_message(checkpoint: Checkpoint) -> job_service_pb2.Checkpoint:
    """A point that training can go on from."""
    return job_service_pb2.Checkpoint(
        name=checkpoint.name,
        step=checkpoint.step,
        attempt=checkpoint.attempt,
        status=enum_number(event_pb2.CheckpointStatus, checkpoint.status.value),
        size_bytes=checkpoint.size_bytes,
        manifest_sha256=checkpoint.manifest_sha256,
        node=checkpoint.node,
        create_time=timestamp(checkpoint.create_time),
        probe_loss=checkpoint.probe_loss,
        held_out_loss=checkpoint.held_out_loss,
        best=checkpoint.best,
    )
