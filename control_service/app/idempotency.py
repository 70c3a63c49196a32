"""Answers a repeated request_id with its first answer. The row is written in the transaction of the work itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from control_service.app.store_ports import RequestRecord, Transaction
from control_service.domain.errors import AlreadyExists

T = TypeVar("T")

KEEP = timedelta(days=7)


@dataclass(frozen=True, kw_only=True)
class RequestKey:
    """One request as its caller names it. An empty request_id means: not idempotent.

    `method` is the RPC's name, `body_digest` a digest of the request without its request_id.
    """

    method: str
    request_id: str
    body_digest: str


def earlier_reference(tx: Transaction, request: RequestKey | None) -> str | None:
    """What an earlier answer to this request was about; None when there is none.

    Raises AlreadyExists REQUEST_ID_REUSED when the same id came with another body.
    """
    if request is None or not request.request_id:
        return None
    record = tx.requests.get(request.method, request.request_id)
    if record is None:
        return None
    if record.body_digest != request.body_digest:
        raise AlreadyExists(
            "REQUEST_ID_REUSED",
            f"request_id {request.request_id!r} came before with another body",
            details={"request_id": request.request_id},
        )
    return record.reference


def once(
    tx: Transaction,
    request: RequestKey | None,
    now: datetime,
    *,
    work: Callable[[], tuple[str, T]],
    replay: Callable[[str], T],
) -> T:
    """Does `work` (reference, answer) the first time, and `replay(reference)` every later time within `KEEP`."""
    reference = earlier_reference(tx, request)
    if reference is not None:
        return replay(reference)
    reference, answer = work()
    if request is not None and request.request_id:
        tx.requests.delete_older_than(now - KEEP)
        tx.requests.put(
            RequestRecord(
                method=request.method,
                request_id=request.request_id,
                body_digest=request.body_digest,
                reference=reference,
                create_time=now,
            )
        )
    return answer
