"""When a call is repeated and how long the pause is; pure. Makes no call and reads no clock of its own.

Every unary call may be repeated on UNAVAILABLE: a read changes nothing, a mutating one carries a request_id that gives
the first answer again, and the rest are idempotent by content.
"""

import random
import uuid
from collections.abc import Iterator

from google.protobuf.message import Message

from tunesmith_client._config import RetryPolicy
from tunesmith_client._errors import TunesmithError, Unavailable


def pauses(policy: RetryPolicy, random_source: random.Random) -> Iterator[float]:
    """Seconds to wait before the second, third, ... attempt; endless."""
    backoff = policy.initial_backoff_seconds
    while True:
        yield backoff * (1 - policy.jitter * random_source.random())
        backoff = min(backoff * 2, policy.max_backoff_seconds)


def pause_after(error: TunesmithError, pause_seconds: float) -> float | None:
    """Seconds to wait before trying again, at least what the service asks for; None when repeating cannot help."""
    if not isinstance(error, Unavailable):
        return None
    return max(pause_seconds, error.retry_after_seconds or 0.0)


def method_of(request: Message) -> str:
    """`CreateProject` for a `CreateProjectRequest`."""
    return request.DESCRIPTOR.name.removesuffix("Request")


def give_request_id(request: Message) -> None:
    """Sets `request_id` where the request has that field and the caller left it empty, so that repeats are safe."""
    if "request_id" in request.DESCRIPTOR.fields_by_name and not request.request_id:  # type: ignore[attr-defined]
        request.request_id = str(uuid.uuid4())  # type: ignore[attr-defined]
