"""A TCP proxy that does to connections what networks do: delay, reset, swallow, half-close, drip. Knows no protocol."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

_CHUNK_BYTES = 64 * 1024
_DRIP_BYTES = 16
# SO_LINGER on with zero seconds: closing sends RST instead of FIN.
_RESET = struct.pack("ii", 1, 0)


@dataclass
class Link:
    """How bytes pass just now; changed at any time, also under open connections."""

    # Before each chunk, both ways.
    delay_seconds: float = 0.0
    # Bytes are taken and never passed on; the connection stays open: a cable that was pulled.
    black_hole: bool = False
    # A few bytes at a time, this many a second; 0: as they come.
    drip_bytes_per_second: float = 0.0


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    upstream: asyncio.StreamWriter
    pipes: list[asyncio.Task[None]] = field(default_factory=list)


class TcpProxy:
    """Listens on a port of its own and passes connections on to `upstream` (host:port)."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self.link = Link()
        # False: who connects is closed at once.
        self.accepting = True
        self.num_accepted = 0
        # Connections that a side ended, with or without a word.
        self.num_ended_by_client = 0
        self.num_ended_by_upstream = 0
        self.address = ""

    @classmethod
    @asynccontextmanager
    async def to(cls, upstream: str) -> AsyncIterator[TcpProxy]:
        """A proxy that runs."""
        proxy = cls(upstream)
        proxy._server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
        proxy.address = f"127.0.0.1:{proxy._server.sockets[0].getsockname()[1]}"
        try:
            yield proxy
        finally:
            proxy._server.close()
            await proxy.close_all()
            for connection in proxy._connections:
                for writer in (connection.client, connection.upstream):
                    # One that will never take what it was sent is not waited for.
                    writer.transport.abort()
            if proxy._serving:
                await asyncio.wait(proxy._serving)

    @property
    def num_open(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    def reset_all(self) -> int:
        """Ends every connection with RST, both ways; how many."""
        connections = list(self._connections)
        for connection in connections:
            for writer in (connection.client, connection.upstream):
                endpoint = writer.get_extra_info("socket")
                # One that ended by itself just now has no descriptor any more.
                if endpoint.fileno() >= 0:
                    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                writer.transport.abort()
        return len(connections)

    def half_close_all(self) -> None:
        """Ends the upstream's direction of every connection: the client reads the end and may still write."""
        for connection in self._connections:
            if connection.client.can_write_eof():
                connection.client.write_eof()

    async def close_all(self) -> None:
        """Closes every connection in order."""
        for connection in list(self._connections):
            for pipe in connection.pipes:
                pipe.cancel()
            await asyncio.gather(*connection.pipes, return_exceptions=True)

    async def cut_at_random(self, seeded: random.Random, *, times: int, pause_seconds: float) -> None:
        """Resets every connection `times` times, after pauses of up to twice `pause_seconds`."""
        for _ in range(times):
            await asyncio.sleep(seeded.uniform(0, 2 * pause_seconds))
            self.reset_all()

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a connection is served in a task"
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        self.num_accepted += 1
        if not self.accepting:
            client.close()
            return
        try:
            from_upstream, upstream = await asyncio.open_connection(*self._upstream)
        except OSError:
            client.close()
            return
        connection = _Connection(client, upstream)
        connection.pipes = [
            asyncio.create_task(self._pipe(reader, upstream)),
            asyncio.create_task(self._pipe(from_upstream, client)),
        ]
        connection.pipes[0].add_done_callback(self._count_client)
        connection.pipes[1].add_done_callback(self._count_upstream)
        self._connections.add(connection)
        try:
            await asyncio.gather(*connection.pipes, return_exceptions=True)
        finally:
            for pipe in connection.pipes:
                pipe.cancel()
            self._connections.discard(connection)
            for writer in (client, upstream):
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    def _count_client(self, pipe: asyncio.Task[None]) -> None:
        self.num_ended_by_client += not pipe.cancelled()

    def _count_upstream(self, pipe: asyncio.Task[None]) -> None:
        self.num_ended_by_upstream += not pipe.cancelled()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                if self.link.delay_seconds:
                    await asyncio.sleep(self.link.delay_seconds)
                if self.link.black_hole:
                    continue
                while chunk and (rate := self.link.drip_bytes_per_second):
                    writer.write(chunk[:_DRIP_BYTES])
                    chunk = chunk[_DRIP_BYTES:]
                    await asyncio.sleep(_DRIP_BYTES / rate)
                writer.write(chunk)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
