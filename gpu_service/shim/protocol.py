"""JSON lines over a stream socket that never blocks. Refuses lines that are too long and peers that do not read."""

from __future__ import annotations

import json
import socket
from typing import Any

MAX_LINE_BYTES = 1024 * 1024
# A peer that lets this much pile up is not reading; it is cut off and can connect again.
MAX_UNSENT_BYTES = 4 * 1024 * 1024

Message = dict[str, Any]


class ProtocolBroken(Exception):
    """The peer sent something that is not a JSON object a line, or does not read."""


def encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class LineSplitter:
    """Turns received bytes into messages; keeps the unfinished line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """Messages that `data` completes. Raises ProtocolBroken."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise ProtocolBroken("a line is longer than the limit")
        messages: list[Message] = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError as error:
                raise ProtocolBroken(f"a line is not JSON: {error}") from error
            if not isinstance(message, dict) or not isinstance(message.get("type"), str):
                raise ProtocolBroken("a line is not an object with a type")
            messages.append(message)
        return messages


class Channel:
    """One non-blocking stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._splitter = LineSplitter()
        self._unsent = bytearray()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Queue a message and send what the socket takes now. Raises ProtocolBroken, OSError."""
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise ProtocolBroken("the peer does not read")
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now. Raises OSError."""
        while self._unsent:
            try:
                sent = self.connection.send(self._unsent)
            except BlockingIOError:
                return
            del self._unsent[:sent]

    def receive(self) -> list[Message] | None:
        """Messages that have arrived; None when the peer closed. Raises ProtocolBroken, OSError."""
        try:
            data = self.connection.recv(65536)
        except BlockingIOError:
            return []
        if not data:
            return None
        return self._splitter.feed(data)

    def close(self) -> None:
        self.connection.close()
