"""What is read of every request alike: its key for idempotency, and how long a node may take to help answer it.

A key is method, request_id, and a digest of everything else in the request.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

from google.protobuf.message import Message

from control_service.app.idempotency import RequestKey

# Left of a caller's deadline for the way back when a node plans.
_ANSWER_SECONDS: Final = 0.5


def request_key(request: Message, *, method: str) -> RequestKey | None:
    """The key of a request; None when it has no request_id, so that nothing is remembered of it."""
    message: Any = request
    if not message.request_id:
        return None
    body: Any = type(request)()
    body.CopyFrom(request)
    body.ClearField("request_id")
    return RequestKey(
        method=method,
        request_id=message.request_id,
        body_digest=hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest(),
    )


def seconds_for_nodes(context: Any) -> float | None:
    """What of the caller's deadline a node may take; None when the caller set none."""
    remaining = context.time_remaining()
    # Of a short one half, so that there is time to ask and time to answer.
    return None if remaining is None else max(remaining - _ANSWER_SECONDS, remaining / 2)
