"""All errors of this service on one page: refusal reasons to gRPC codes, with ErrorInfo, BadRequest and RetryInfo.

Refuses to leak a defect's text: what is not a refusal is INTERNAL with the request id, and the log has the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from gpu_service.domain.errors import Refusal

DOMAIN = "tunesmith"

_CODES: Mapping[str, grpc.StatusCode] = MappingProxyType(
    {
        "BLOB_NOT_FOUND": grpc.StatusCode.FAILED_PRECONDITION,
        "CHAT_TEMPLATE_MISSING": grpc.StatusCode.FAILED_PRECONDITION,
        "CHECKPOINT_NOT_FOUND": grpc.StatusCode.FAILED_PRECONDITION,
        "DEVICE_UNSUPPORTED": grpc.StatusCode.FAILED_PRECONDITION,
        "DISK_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "DOES_NOT_FIT": grpc.StatusCode.FAILED_PRECONDITION,
        "GENERATION": grpc.StatusCode.INTERNAL,
        "HOST_OUT_OF_MEMORY": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "JOB_STATE": grpc.StatusCode.FAILED_PRECONDITION,
        "LIBRARY_KNOWN_BAD": grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_INVALID": grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_NOT_FOUND": grpc.StatusCode.FAILED_PRECONDITION,
        "MEMORY_PROBE": grpc.StatusCode.INTERNAL,
        "NODE_BUSY": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "NODE_DRAINING": grpc.StatusCode.FAILED_PRECONDITION,
        "NOT_OFFERED": grpc.StatusCode.FAILED_PRECONDITION,
        "OFFSET_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
        "PICKLE_REFUSED": grpc.StatusCode.FAILED_PRECONDITION,
        "PLANNING": grpc.StatusCode.INTERNAL,
        "READER_STALLED": grpc.StatusCode.UNAVAILABLE,
        "REMOTE_CODE_REFUSED": grpc.StatusCode.FAILED_PRECONDITION,
        "RESUME_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
        "RUN_CONFLICT": grpc.StatusCode.ALREADY_EXISTS,
        "RUN_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
        "STALE_EPOCH": grpc.StatusCode.FAILED_PRECONDITION,
        "WRONG_INSTALLATION": grpc.StatusCode.FAILED_PRECONDITION,
    }
)
# Everything else that a refusal can say is about the request or its data.
_OTHER_CODE = grpc.StatusCode.INVALID_ARGUMENT

# What the same reason means to a call that asks for the missing thing itself, or that brings no data: (method, reason).
_CODES_OF_METHODS: Mapping[tuple[str, str], grpc.StatusCode] = MappingProxyType(
    {
        ("ReadBlob", "BLOB_NOT_FOUND"): grpc.StatusCode.NOT_FOUND,
        ("Generate", "MODEL_NOT_FOUND"): grpc.StatusCode.NOT_FOUND,
        ("Generate", "CHAT_TEMPLATE_MISSING"): grpc.StatusCode.FAILED_PRECONDITION,
    }
)

# Seconds after which asking again may help.
_RETRY_SECONDS: Mapping[str, float] = MappingProxyType({"NODE_BUSY": 5.0, "DISK_FULL": 10.0, "READER_STALLED": 1.0})


def code_of(reason: str, *, method: str = "") -> grpc.StatusCode:
    """The gRPC status code of a refusal's reason; `method` is the call's bare name."""
    return _CODES_OF_METHODS.get((method, reason), _CODES.get(reason, _OTHER_CODE))


def status_of(refusal: Refusal, *, method: str = "") -> grpc.Status:
    """The rich status of a refusal of a call of this bare name."""
    code = code_of(refusal.reason, method=method)
    metadata = {**refusal.details, "fault": refusal.fault.value}
    for name, value in (
        ("stage", refusal.stage),
        ("field", refusal.field),
        ("file", refusal.file),
        ("exception_type", refusal.exception_type),
    ):
        if value:
            metadata[name] = value
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=metadata),
    ]
    if refusal.field and code is grpc.StatusCode.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(field=refusal.field, description=refusal.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    # A refusal that knows better says so.
    retry_seconds = refusal.details.get("retry_after_seconds", _RETRY_SECONDS.get(refusal.reason))
    if retry_seconds is not None:
        delay = Duration()
        delay.FromMilliseconds(int(float(retry_seconds) * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return _status(code, refusal.message, details)


def internal_status(request_id: str) -> grpc.Status:
    """The status of a defect."""
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"request_id": request_id})
    return _status(grpc.StatusCode.INTERNAL, f"a defect of the GPU service; its log has request {request_id}", [info])


def _status(code: grpc.StatusCode, message: str, details: list[Message]) -> grpc.Status:
    packed: list[AnyMessage] = []
    for detail in details:
        wrapped = AnyMessage()
        wrapped.Pack(detail)
        packed.append(wrapped)
    # grpc's enum holds (number, name).
    number: int = code.value[0]
    return rpc_status.to_status(status_pb2.Status(code=number, message=message, details=packed))
