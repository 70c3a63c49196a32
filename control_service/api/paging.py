"""Page tokens: a position in one listing with one set of filters, signed. Reads and writes no listing."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from google.protobuf.message import Message

from control_service.domain.errors import InvalidArgument, invalid_field

DEFAULT_PAGE_SIZE: Final = 50
_SIGNATURE_BYTES: Final = 16

# Clients take 4 MiB unless they say otherwise.
MAX_PAGE_BYTES: Final = 3 * 1024**2

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class PageTokens:
    """Makes and reads tokens. The secret stays the same over restarts, so that a client's listing goes on."""

    def __init__(self, *, secret: str) -> None:
        self._key = hashlib.sha256(b"tunesmith page tokens:" + secret.encode()).digest()

    def encode(self, position: str, *, listing: str, filters: Mapping[str, object]) -> str:
        """A token for what follows `position`; empty for the empty position, which nothing follows."""
        if not position:
            return ""
        body = position.encode()
        return base64.urlsafe_b64encode(self._signature(body, listing, filters) + body).decode().rstrip("=")

    def decode(self, token: str, *, listing: str, filters: Mapping[str, object]) -> str:
        """The position of a token; empty for no token. PAGE_TOKEN_INVALID: not one given out for this listing."""
        if not token:
            return ""
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
            signature, body = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
            if not hmac.compare_digest(signature, self._signature(body, listing, filters)):
                raise _not_ours()
            return body.decode()
        except (binascii.Error, ValueError) as error:
            raise _not_ours() from error

    def _signature(self, body: bytes, listing: str, filters: Mapping[str, object]) -> bytes:
        bound = json.dumps([listing, filters], sort_keys=True).encode()
        message = len(bound).to_bytes(4, "big") + bound + body
        return hmac.new(self._key, message, hashlib.sha256).digest()[:_SIGNATURE_BYTES]


def _not_ours() -> InvalidArgument:
    return invalid_field(
        "page_token", "is not one that this service gave out for this listing", reason="PAGE_TOKEN_INVALID"
    )


def page_limit(page_size: int) -> int:
    """How many items to ask the use case for: one more than the page, which tells whether another page follows."""
    return (page_size or DEFAULT_PAGE_SIZE) + 1


def cut_page(
    items: Sequence[T], *, page_size: int, to_message: Callable[[T], M], position: Callable[[T], str]
) -> tuple[list[M], str]:
    """(messages of the page, the position that the next one follows); the position is empty on the last page.

    A page ends early when its messages would be too large together; a client goes on by the token as always.
    """
    messages: list[M] = []
    size_bytes = 0
    for item in items[: page_size or DEFAULT_PAGE_SIZE]:
        message = to_message(item)
        size_bytes += message.ByteSize()
        if messages and size_bytes > MAX_PAGE_BYTES:
            break
        messages.append(message)
    return messages, position(items[len(messages) - 1]) if len(messages) < len(items) else ""
