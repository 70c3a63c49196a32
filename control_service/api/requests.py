"""Names a mutating request for idempotency: method, request_id, and a digest of everything else in it."""

from __future__ import annotations

import hashlib
from typing import Any

from google.protobuf.message import Message

from control_service.app.idempotency import RequestKey


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
