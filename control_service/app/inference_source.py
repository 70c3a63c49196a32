"""Finds what answers a question: a job's adapter, the newest checkpoint of one that goes on, a base. Asks nobody."""

from __future__ import annotations

from dataclasses import replace

from control_service.app.lookups import job_of
from control_service.app.store_ports import Transaction
from control_service.domain.artifact import ArtifactKind, CheckpointStatus
from control_service.domain.errors import FailedPrecondition, NotFound
from control_service.domain.generation import (
    ADAPTER_FILES,
    CHECKPOINT_FILES,
    GenerationRequest,
    GenerationSource,
)
from control_service.domain.job import Job

# What such a job leaves and saves is no adapter.
_TRAINS_WHOLE_MODEL = "full"


def find_source(tx: Transaction, source: GenerationSource) -> GenerationRequest:
    """The question but for messages and sampling. NotFound JOB_NOT_FOUND, ARTIFACT_NOT_FOUND; FailedPrecondition
    NOT_OFFERED (the job trains a whole model)."""
    if not source.job_id:
        return GenerationRequest(base_model=source.base_model)
    job = job_of(tx, source.job_id)
    settings = job.spec.hyperparameters
    request = GenerationRequest(
        base_model=job.spec.base_model,
        weights_digest=job.weights_digest,
        model_type=job.spec.model_type,
        training_type=job.spec.training_type,
        quantization=settings.get("quantization", {}),
        chat_template=settings.get("chat_template", ""),
    )
    return request if source.base_only else _with_adapter(tx, job, request)


def _with_adapter(tx: Transaction, job: Job, request: GenerationRequest) -> GenerationRequest:
    if job.spec.training_type == _TRAINS_WHOLE_MODEL:
        raise FailedPrecondition(
            "NOT_OFFERED",
            f"job {job.job_id} trains a whole model; put its artifact `model` below the nodes' models directory, "
            "and ask it as a base model",
            details={"job_id": job.job_id},
        )
    for artifact in tx.artifacts.list_for_job(job.job_id):
        if artifact.kind is ArtifactKind.ADAPTER:
            files = tuple(file for file in artifact.files if file.path in ADAPTER_FILES)
            return replace(request, adapter=artifact.name, adapter_files=files)
    for checkpoint in reversed(tx.checkpoints.list_for_job(job.job_id)):
        if checkpoint.status is CheckpointStatus.REPLICATED:
            files = tuple(file for file in checkpoint.files if file.path in CHECKPOINT_FILES)
            lora = job.spec.hyperparameters.get("lora", {})
            return replace(request, adapter=checkpoint.name, adapter_files=files, lora=lora)
    state = job.state.value
    raise NotFound(
        "ARTIFACT_NOT_FOUND",
        f"job {job.job_id} is {state} and has no adapter"
        + ("" if job.is_over else "; it can be asked when control has a copy of a checkpoint, or it has SUCCEEDED"),
        details={"job_id": job.job_id, "state": state},
    )
