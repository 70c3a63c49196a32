"""The shim's Unix socket and the connections that servers hold to it. Refuses to wait for any of them."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path

from gpu_service.shim.protocol import Channel, Message, ProtocolBroken

SOCKET_NAME = "shim.sock"
_LAST_FLUSH_SECONDS = 2.0


class ServerConnections:
    """All server connections. `on_message(message, channel)` is called for each message of any."""

    def __init__(self, selector: selectors.BaseSelector, on_message: Callable[[Message, Channel], None]) -> None:
        """Bind `shim.sock` in the current directory: a relative name stays below the 108 bytes of sun_path."""
        self._selector = selector
        self._on_message = on_message
        self._channels: list[Channel] = []
        self.last_connected = time.monotonic()
        Path(SOCKET_NAME).unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(SOCKET_NAME)
        self._listener.listen(16)
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def connected(self) -> bool:
        return bool(self._channels)

    def _accept(self, _mask: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        channel = Channel(connection)
        self._channels.append(channel)
        self._selector.register(connection, selectors.EVENT_READ, lambda mask: self._ready(channel, mask))

    def _ready(self, channel: Channel, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                channel.flush()
            messages = channel.receive() if mask & selectors.EVENT_READ else []
        except (OSError, ProtocolBroken):
            messages = None
        if messages is None:
            self._drop(channel)
            return
        for message in messages:
            self._on_message(message, channel)
        self._watch_writes(channel)

    def send(self, channel: Channel, message: Message) -> None:
        """Answer one connection; a broken one is dropped."""
        try:
            channel.send(message)
        except (OSError, ProtocolBroken):
            self._drop(channel)
            return
        self._watch_writes(channel)

    def send_all(self, message: Message) -> None:
        """A notice to every connection."""
        for channel in list(self._channels):
            self.send(channel, message)

    def _watch_writes(self, channel: Channel) -> None:
        if channel in self._channels:
            key = self._selector.get_key(channel.connection)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.has_unsent else 0)
            if key.events != events:
                self._selector.modify(channel.connection, events, key.data)

    def _drop(self, channel: Channel) -> None:
        if channel in self._channels:
            self._channels.remove(channel)
            self._selector.unregister(channel.connection)
            channel.close()
            self.last_connected = time.monotonic()

    def close(self) -> None:
        """Give every connection a bounded time to take the last notices, then close."""
        self._selector.unregister(self._listener)
        self._listener.close()
        deadline = time.monotonic() + _LAST_FLUSH_SECONDS
        for channel in list(self._channels):
            channel.connection.settimeout(max(0.01, deadline - time.monotonic()))
            # A server that does not read learns the end from exit.json.
            with contextlib.suppress(OSError):
                channel.flush()
            self._drop(channel)
