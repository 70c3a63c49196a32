"""What a fake run says and leaves: the payloads of a short training, in a journal's own order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from tunesmith.common.v1 import event_pb2, file_pb2, plan_pb2
from tunesmith.gpu.v1 import run_service_pb2

NUM_STEPS = 4
Payload = event_pb2.EventPayload

_LAST_STATE: Mapping[int, event_pb2.RunState.ValueType] = {
    run_service_pb2.STOP_MODE_UNSPECIFIED: event_pb2.RUN_STATE_SUCCEEDED,
    run_service_pb2.STOP_MODE_CANCEL: event_pb2.RUN_STATE_CANCELLED,
    run_service_pb2.STOP_MODE_CHECKPOINT: event_pb2.RUN_STATE_INTERRUPTED,
}


def opening_payloads(*, num_steps: int, resume_step: int) -> Iterator[Payload]:
    """From ACCEPTED to the first step."""
    yield Payload(
        run_state=event_pb2.RunStateEvent(
            previous_state=event_pb2.RUN_STATE_ACCEPTED, state=event_pb2.RUN_STATE_RUNNING
        )
    )
    yield Payload(phase=event_pb2.PhaseEvent(phase=event_pb2.PHASE_PLANNING))
    yield Payload(plan=plan_pb2.Plan(num_steps=num_steps, weights_digest="a" * 64, data_digest="b" * 64))
    yield Payload(phase=event_pb2.PhaseEvent(phase=event_pb2.PHASE_LOADING))
    yield Payload(phase=event_pb2.PhaseEvent(phase=event_pb2.PHASE_TRAINING))
    if resume_step:
        yield Payload(resumed=event_pb2.ResumedEvent(from_step=resume_step, checkpoint=f"step-{resume_step:08d}"))


def step_payload(step: int, *, num_steps: int) -> Payload:
    """One optimizer step."""
    return Payload(
        step=event_pb2.StepEvent(
            step=step, total_steps=num_steps, epoch=step / num_steps, loss=4.0 / step, tokens_per_second=100.0
        )
    )


def closing_payloads(*, stop_mode: int, last_step: int) -> Iterator[Payload]:
    """After the last step; a checkpoint first when that was asked for."""
    if stop_mode == run_service_pb2.STOP_MODE_CHECKPOINT:
        yield checkpoint_payload(last_step, ())
    yield Payload(memory_released=event_pb2.MemoryReleasedEvent(freed_bytes=10))
    yield Payload(
        run_state=event_pb2.RunStateEvent(previous_state=event_pb2.RUN_STATE_RUNNING, state=_LAST_STATE[stop_mode])
    )


def checkpoint_payload(step: int, files: Iterable[file_pb2.FileReference]) -> Payload:
    """A checkpoint of these files that the node has."""
    return Payload(
        checkpoint=event_pb2.CheckpointEvent(
            name=f"step-{step:08d}",
            step=step,
            status=event_pb2.CHECKPOINT_STATUS_COMMITTED,
            size_bytes=10,
            manifest_sha256="c" * 64,
            files=files,
        )
    )


def file_references(files: Mapping[str, bytes]) -> list[file_pb2.FileReference]:
    """As events name these files."""
    return [
        file_pb2.FileReference(path=path, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
        for path, content in files.items()
    ]


def artifact_files(job_id: str) -> Mapping[str, Mapping[str, bytes]]:
    """Files by path of each artifact of a run that ended well; one is larger than a chunk, one is empty."""
    return {
        "adapter": {
            "adapter_config.json": b'{"peft_type": "LORA"}',
            "adapter_model.safetensors": job_id.encode() * 60_000,
            "nested/empty.txt": b"",
        },
        "report": {"metrics.json": b"{}"},
    }
