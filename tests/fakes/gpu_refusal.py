"""How a fake node refuses a call, with a typed reason, as a node does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status


@dataclass
class Refusal:
    """What a call is refused with."""

    code: grpc.StatusCode
    reason: str
    message: str = "refused"
    metadata: dict[str, str] = field(default_factory=dict)


async def refuse(context: Any, refusal: Refusal | None) -> None:
    """Ends the call, if there is something to refuse it with."""
    if refusal is None:
        return
    status = status_pb2.Status(code=refusal.code.value[0], message=refusal.message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=refusal.reason, domain="tunesmith", metadata=refusal.metadata)
    )
    await context.abort_with_status(rpc_status.to_status(status))
