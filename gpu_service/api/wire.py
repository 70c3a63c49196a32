"""Turns requests into what the rooms behind take, and their answers into messages. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import json_format

from gpu_service.catalog.base_models import BaseModel
from gpu_service.devices import Device
from gpu_service.domain.errors import Refusal, refuse_user
from gpu_service.journal import Record
from gpu_service.runs.capabilities import Capabilities, Entry
from gpu_service.runs.inspection import InspectRequest
from gpu_service.runs.manager import StartRequest
from gpu_service.runs.manifests import FileReference
from gpu_service.runs.node_files import RunKey
from gpu_service.runs.run import Run
from gpu_service.runs.run_files import ResumeRequest
from tunesmith.common.v1 import errors_pb2, event_pb2, plan_pb2, training_spec_pb2
from tunesmith.gpu.v1 import run_service_pb2

# Control's previews ask for no more.
MAX_INSPECTED_ROWS = 100


def spec_from_wire(spec: training_spec_pb2.TrainingSpec) -> dict[str, Any]:
    """Proto JSON with proto names, as `run.json` and the planner have it; int64 are strings."""
    return json_format.MessageToDict(spec, preserving_proto_field_name=True)


def key_from_wire(key: run_service_pb2.RunKey) -> RunKey:
    return RunKey(installation_id=key.installation_id, job_id=key.job_id, attempt=key.attempt)


def start_from_wire(request: run_service_pb2.StartRunRequest) -> StartRequest:
    resume = None
    if request.HasField("resume_from"):
        resume = ResumeRequest(
            checkpoint=request.resume_from.checkpoint,
            step=request.resume_from.step,
            attempt=request.resume_from.attempt,
            files=[
                FileReference(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
                for file in request.resume_from.files
            ],
        )
    return StartRequest(
        key=key_from_wire(request.key),
        spec_digest=request.spec_digest,
        spec=spec_from_wire(request.spec),
        weights_digest=request.weights_digest,
        resume=resume,
    )


def inspect_from_wire(request: run_service_pb2.InspectDatasetRequest) -> InspectRequest:
    """Raises `Refusal` INVALID_FIELD."""
    if not 0 <= request.num_rows <= MAX_INSPECTED_ROWS:
        message = f"num_rows must be at least 0 and at most {MAX_INSPECTED_ROWS}"
        raise refuse_user("INVALID_FIELD", message, field="num_rows")
    return InspectRequest(
        dataset=json_format.MessageToDict(request.dataset, preserving_proto_field_name=True),
        base_model=request.base_model,
        chat_template=request.chat_template,
        loss_on=request.loss_on,
        max_length=request.max_length,
        num_rows=request.num_rows,
        count_tokens=request.count_tokens,
    )


def inspected_to_wire(found: Mapping[str, Any]) -> run_service_pb2.InspectDatasetResponse:
    return json_format.ParseDict(dict(found), run_service_pb2.InspectDatasetResponse())


def run_to_wire(run: Run) -> run_service_pb2.Run:
    summary = run.summary
    checkpoint = summary.last_checkpoint
    return run_service_pb2.Run(
        key=run_service_pb2.RunKey(
            installation_id=run.key.installation_id, job_id=run.key.job_id, attempt=run.key.attempt
        ),
        spec_digest=run.spec_digest,
        state=event_pb2.RunState.Value(f"RUN_STATE_{run.state.name}"),
        phase=summary.phase,
        last_run_sequence=summary.last_run_sequence,
        failure=summary.failure,
        artifacts=[
            run_service_pb2.RunArtifact(name=artifact.name, kind=artifact.kind, files=artifact.files)
            for artifact in summary.artifacts.values()
        ],
        last_checkpoint=checkpoint.name if checkpoint else "",
        last_checkpoint_step=checkpoint.step if checkpoint else 0,
        weights_digest=run.weights_digest,
    )


def records_to_wire(records: Sequence[Record]) -> run_service_pb2.WatchRunResponse:
    """The events as they lie in the journal; their payloads are not looked at."""
    response = run_service_pb2.WatchRunResponse()
    for record in records:
        response.events.add().MergeFromString(record.event)
    return response


def plan_to_wire(plan: Mapping[str, Any]) -> plan_pb2.Plan:
    return json_format.ParseDict(dict(plan), plan_pb2.Plan())


def device_to_wire(device: Device) -> run_service_pb2.Device:
    return run_service_pb2.Device(
        index=device.index,
        type=device.type,
        name=device.name,
        total_memory_bytes=device.total_memory_bytes,
        free_memory_bytes=device.free_memory_bytes,
        compute_capability=device.compute_capability,
        quarantine_reason=device.quarantine_reason,
    )


def capabilities_to_wire(
    found: Capabilities, *, node_name: str, instance_id: str
) -> run_service_pb2.GetCapabilitiesResponse:
    return run_service_pb2.GetCapabilitiesResponse(
        node_name=node_name,
        instance_id=instance_id,
        devices=[device_to_wire(device) for device in found.devices],
        models=[_model_to_wire(model) for model in found.models],
        quantizations=[_entry_to_wire(entry) for entry in found.quantizations],
        training_types=[_entry_to_wire(entry) for entry in found.training_types],
        dataset_formats=[_entry_to_wire(entry) for entry in found.dataset_formats],
        model_types=[_entry_to_wire(entry) for entry in found.model_types],
        optimizers=[_entry_to_wire(entry) for entry in found.optimizers],
        exports=[_entry_to_wire(entry) for entry in found.exports],
        versions=found.versions,
        problem=failure_to_wire(found.problem) if found.problem is not None else None,
    )


def failure_to_wire(refusal: Refusal) -> errors_pb2.Failure:
    return errors_pb2.Failure(
        reason=errors_pb2.ErrorReason.Value(f"ERROR_REASON_{refusal.reason}"),
        fault=errors_pb2.Fault.Value(f"FAULT_{refusal.fault.value}"),
        message=refusal.message,
        stage=refusal.stage,
        exception_type=refusal.exception_type,
        file=refusal.file,
        details=refusal.details,
    )


def _entry_to_wire(entry: Entry) -> run_service_pb2.CatalogEntry:
    return run_service_pb2.CatalogEntry(id=entry.id, description=entry.description, details=entry.details)


def _model_to_wire(model: BaseModel) -> run_service_pb2.NodeModel:
    return run_service_pb2.NodeModel(
        name=model.name,
        config_type=model.config_type,
        weights_digest=model.weights_digest,
        size_bytes=model.size_bytes,
        num_parameters=model.num_parameters,
        vocabulary_size=model.vocabulary_size,
        has_chat_template=model.has_chat_template,
        problem=model.problem,
    )
