"""Translates between the GPU service's messages and the domain. Calls nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from google.protobuf import json_format

from control_service.app.ports import InspectDataset, PlanLevel, StartRun
from control_service.domain.artifact import ArtifactKind
from control_service.domain.dataset import (
    DatasetInspection,
    HistogramBucket,
    RenderedExample,
    Segment,
    TokenStatistics,
)
from control_service.domain.errors import Internal
from control_service.domain.event import StoredEvent
from control_service.domain.generation import GeneratedPart, GenerationRequest
from control_service.domain.node import CatalogEntry, Device, NodeCapabilities, NodeModel, NodeReport
from control_service.domain.run import ObservedRun, Phase, ResumeFrom, RunArtifact, RunKey, RunState, StopMode
from control_service.wire.training_spec import proto_json, reference_message, spec_message
from control_service.wire.values import (
    enum_name,
    enum_number,
    failure_value,
    file_messages,
    file_values,
    utc_time,
)
from tunesmith.common.v1 import dataset_pb2, event_pb2, generation_pb2, plan_pb2, training_spec_pb2
from tunesmith.gpu.v1 import inference_service_pb2, run_service_pb2

PLAN_LEVELS: Final = {level: enum_number(plan_pb2.PlanLevel, level.value) for level in PlanLevel}
STOP_MODES: Final = {mode: enum_number(run_service_pb2.StopMode, mode.value) for mode in StopMode}


def key_message(key: RunKey) -> run_service_pb2.RunKey:
    """Names one attempt."""
    return run_service_pb2.RunKey(installation_id=key.installation_id, job_id=key.job_id, attempt=key.attempt)


def start_run_message(request: StartRun) -> run_service_pb2.StartRunRequest:
    """Everything a node needs to start an attempt."""
    return run_service_pb2.StartRunRequest(
        key=key_message(request.key),
        spec_digest=request.spec_digest,
        spec=spec_message(request.spec),
        weights_digest=request.weights_digest,
        resume_from=_resume_from_message(request.resume_from) if request.resume_from else None,
    )


def inspect_message(request: InspectDataset, *, installation_id: str) -> run_service_pb2.InspectDatasetRequest:
    """What a node is asked about a dataset."""
    return run_service_pb2.InspectDatasetRequest(
        installation_id=installation_id,
        dataset=reference_message(request.dataset),
        base_model=request.base_model,
        chat_template=request.chat_template,
        loss_on=request.loss_on,
        max_length=request.max_length,
        num_rows=request.num_rows,
        count_tokens=request.count_tokens,
    )


def inspection_value(message: run_service_pb2.InspectDatasetResponse) -> DatasetInspection:
    """What a node found."""
    return DatasetInspection(
        rows=tuple(
            RenderedExample(
                segments=_segments(row.segments),
                rejected_segments=_segments(row.rejected_segments),
                num_tokens=row.num_tokens,
                num_target_tokens=row.num_target_tokens,
                truncated=row.truncated,
                dropped_reason=row.dropped_reason,
            )
            for row in message.rows
        ),
        tokens=_token_statistics(message.tokens) if message.HasField("tokens") else None,
    )


def _segments(messages: Iterable[dataset_pb2.Segment]) -> tuple[Segment, ...]:
    return tuple(Segment(text=m.text, is_target=m.is_target, num_tokens=m.num_tokens) for m in messages)


def _token_statistics(message: dataset_pb2.TokenStatistics) -> TokenStatistics:
    return TokenStatistics(
        base_model=message.base_model,
        num_tokens=message.num_tokens,
        num_target_tokens=message.num_target_tokens,
        longest_tokens=message.longest_tokens,
        num_truncated=message.num_truncated,
        dropped=dict(message.dropped),
        lengths=tuple(HistogramBucket(minimum=bucket.minimum, count=bucket.count) for bucket in message.lengths),
    )


def _resume_from_message(resume: ResumeFrom) -> run_service_pb2.ResumeFrom:
    return run_service_pb2.ResumeFrom(
        checkpoint=resume.checkpoint, step=resume.step, attempt=resume.attempt, files=file_messages(resume.files)
    )


def run_value(message: run_service_pb2.Run) -> ObservedRun:
    """A run as its node reports it. Internal: a state that this version does not know."""
    try:
        return ObservedRun(
            key=RunKey(
                installation_id=message.key.installation_id,
                job_id=message.key.job_id,
                attempt=message.key.attempt,
            ),
            spec_digest=message.spec_digest,
            state=RunState(enum_name(event_pb2.RunState, message.state)),
            phase=Phase(enum_name(event_pb2.Phase, message.phase)),
            last_run_sequence=message.last_run_sequence,
            failure=failure_value(message.failure) if message.HasField("failure") else None,
            artifacts=tuple(
                RunArtifact(
                    name=artifact.name,
                    kind=ArtifactKind(enum_name(event_pb2.ArtifactKind, artifact.kind)),
                    files=file_values(artifact.files),
                )
                for artifact in message.artifacts
            ),
            last_checkpoint=message.last_checkpoint,
            last_checkpoint_step=message.last_checkpoint_step,
            weights_digest=message.weights_digest,
        )
    except ValueError as error:
        raise Internal(
            "INTERNAL", f"the node reports job {message.key.job_id} in a way unknown here: {error}"
        ) from error


def report_value(message: run_service_pb2.WatchNodeResponse) -> NodeReport:
    """One report of a node."""
    return NodeReport(
        node_name=message.node_name,
        instance_id=message.instance_id,
        devices=_devices(message.devices),
        runs=tuple(run_value(run) for run in message.runs),
        accepting=message.accepting,
        draining=message.draining,
        resident_base_model=message.resident_base_model,
    )


def capabilities_value(message: run_service_pb2.GetCapabilitiesResponse) -> NodeCapabilities:
    """What a node is and can do."""
    return NodeCapabilities(
        node_name=message.node_name,
        instance_id=message.instance_id,
        devices=_devices(message.devices),
        models=tuple(
            NodeModel(
                name=model.name,
                config_type=model.config_type,
                weights_digest=model.weights_digest,
                size_bytes=model.size_bytes,
                num_parameters=model.num_parameters,
                vocabulary_size=model.vocabulary_size,
                has_chat_template=model.has_chat_template,
                problem=model.problem,
            )
            for model in message.models
        ),
        quantizations=_entries(message.quantizations),
        training_types=_entries(message.training_types),
        dataset_formats=_entries(message.dataset_formats),
        model_types=_entries(message.model_types),
        versions=dict(message.versions),
        problem=failure_value(message.problem) if message.HasField("problem") else None,
    )


def event_values(message: run_service_pb2.WatchRunResponse) -> tuple[StoredEvent, ...]:
    """A batch of a run's events; payloads stay encoded."""
    return tuple(
        StoredEvent(
            sequence=0,
            attempt=event.attempt,
            run_sequence=event.run_sequence,
            kind=int(event.kind),
            time=utc_time(event.time),
            payload=event.payload,
        )
        for event in message.events
    )


def generate_message(request: GenerationRequest) -> inference_service_pb2.GenerateRequest:
    """Everything that a node needs to answer."""
    return inference_service_pb2.GenerateRequest(
        base_model=request.base_model,
        weights_digest=request.weights_digest,
        model_type=request.model_type,
        training_type=request.training_type,
        quantization=json_format.ParseDict(dict(request.quantization), training_spec_pb2.Quantization()),
        adapter_files=file_messages(request.adapter_files),
        lora=json_format.ParseDict(dict(request.lora), training_spec_pb2.Lora()) if request.lora else None,
        chat_template=request.chat_template,
        messages=[
            generation_pb2.ChatMessage(role=message.role, content=message.content) for message in request.messages
        ],
        sampling=json_format.ParseDict(dict(request.sampling), generation_pb2.Sampling()),
    )


def part_value(part: generation_pb2.GeneratedPart) -> GeneratedPart:
    """A part of an answer."""
    if not part.finish_reason:
        return GeneratedPart(text=part.text, num_tokens=part.num_tokens)
    return GeneratedPart(
        text=part.text,
        num_tokens=part.num_tokens,
        finish_reason=enum_name(generation_pb2.FinishReason, part.finish_reason),
        statistics=proto_json(part.statistics),
    )


def _devices(messages: Iterable[run_service_pb2.Device]) -> tuple[Device, ...]:
    return tuple(
        Device(
            index=device.index,
            type=device.type,
            name=device.name,
            total_memory_bytes=device.total_memory_bytes,
            free_memory_bytes=device.free_memory_bytes,
            compute_capability=device.compute_capability,
            quarantine_reason=device.quarantine_reason,
        )
        for device in messages
    )


def _entries(messages: Iterable[run_service_pb2.CatalogEntry]) -> tuple[CatalogEntry, ...]:
    return tuple(
        CatalogEntry(id=entry.id, description=entry.description, details=dict(entry.details)) for entry in messages
    )
