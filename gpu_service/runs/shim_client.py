"""Starts shims, connects to them, and tells whether one lives. The server's only way to an engine.

Refuses to read an exit status: the shim is the engine's parent and writes it down. A shim outlives this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextvars import Context
from pathlib import Path
from typing import Any

from gpu_service.shim.lock import is_held
from gpu_service.shim.process_tree import facts
from gpu_service.shim.protocol import MAX_LINE_BYTES, encode
from gpu_service.shim.records import ShimRecord

Message = dict[str, Any]
_SHIM_COMMAND = (sys.executable, "-m", "gpu_service.shim")
_LOOK_AGAIN_SECONDS = 0.05
_CONNECT_LIMIT_SECONDS = 60.0


class ShimGone(Exception):
    """The shim does not answer any more: it ended, or never came up."""


def spawn(directory: Path) -> subprocess.Popen[bytes]:
    """Start the shim of an engine directory, in a session of its own. Blocks for the exec. Raises OSError."""
    with (directory / "engine.log").open("ab") as log:
        return subprocess.Popen(
            [*_SHIM_COMMAND, str(directory)],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


async def bury(directory: Path, stop_mode: str | None = None) -> None:
    """Have what is left of a dead shim's engine ended and its run closed, which was asked to stop in this mode.

    Raises OSError, ShimGone when that failed.
    """
    asked = ("--stop-mode", stop_mode) if stop_mode else ()
    process = await asyncio.create_subprocess_exec(
        *_SHIM_COMMAND, "--bury", *asked, str(directory), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, errors = await process.communicate()
    # 3: the shim lives after all, so there is nothing to bury.
    if process.returncode not in (0, 3):
        raise ShimGone(f"burying {directory} failed: {errors.decode(errors='replace')[-2000:]}")


async def is_alive(directory: Path) -> bool:
    """Whether a shim holds the engine directory."""
    return await asyncio.to_thread(is_held, directory / "shim.lock")


def kill_shim(directory: Path) -> bool:
    """SIGKILL to the shim that the directory names, if it is still that process; whether it was.

    One that waits for a disk is left alone: it answers behind that, and would not die before. Blocks. Raises OSError,
    ValueError.
    """
    record = ShimRecord.read(directory)
    if record is None:
        return False
    try:
        descriptor = os.pidfd_open(record.shim_pid)
    except ProcessLookupError:
        return False
    try:
        process = facts(record.shim_pid)
        is_it = process is not None and process.start_time == record.shim_start_time and process.state != "D"
        if is_it:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return is_it
    finally:
        os.close(descriptor)


class ShimClient:
    """A connection to one shim. `on_notice` gets every message that is not an answer; `gone` is set when it ends."""

    def __init__(self, directory: Path, on_notice: Callable[[Message], None], *, answer_limit_seconds: float) -> None:
        self._directory = directory
        self._answer_limit_seconds = answer_limit_seconds
        self._on_notice = on_notice
        self._answers: deque[asyncio.Future[Message]] = deque()
        self._writer: asyncio.StreamWriter | None = None
        self._receiving: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()

    async def connect(self, process: subprocess.Popen[bytes] | None = None) -> None:
        """Connect; with `process`, wait for a shim that is just coming up. Raises ShimGone."""
        try:
            async with asyncio.timeout(_CONNECT_LIMIT_SECONDS):
                while True:
                    try:
                        reader, self._writer = await self._open()
                        break
                    except OSError as error:
                        if process is None or process.poll() is not None:
                            raise ShimGone(f"{self._directory}: {error}") from error
                    await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        except TimeoutError:
            raise ShimGone(f"{self._directory}: no socket within {_CONNECT_LIMIT_SECONDS} s") from None
        # In a context of its own: it outlives the run and the request for which it was made, whose ids are in this one.
        self._receiving = asyncio.create_task(
            self._receive(reader), name=f"shim-{self._directory.name}", context=Context()
        )

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # Through the directory's descriptor: a path below /proc/self/fd fits the 108 bytes that a socket's name may
        # have.
        descriptor = await asyncio.to_thread(os.open, self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return await asyncio.open_unix_connection(f"/proc/self/fd/{descriptor}/shim.sock", limit=MAX_LINE_BYTES)
        finally:
            os.close(descriptor)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message: Message = json.loads(line)
                if message["type"] == "status":
                    answer = self._answers.popleft()
                    if not answer.done():
                        answer.set_result(message)
                else:
                    self._on_notice(message)
        except OSError:
            pass  # a reset is an end like any other
        finally:
            self.gone.set()
            while self._answers:
                answer = self._answers.popleft()
                if not answer.done():
                    answer.set_exception(ShimGone(f"{self._directory}: the connection ended"))

    async def status(self) -> Message:
        """The shim's status. Raises ShimGone."""
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        await self.send({"type": "status"})
        try:
            async with asyncio.timeout(self._answer_limit_seconds):
                return await answer
        except TimeoutError:
            raise ShimGone(f"{self._directory}: no answer within {self._answer_limit_seconds} s") from None

    async def send(self, message: Message) -> None:
        """Send a command. Raises ShimGone."""
        if self._writer is None or self.gone.is_set():
            raise ShimGone(f"{self._directory}: not connected")
        try:
            self._writer.write(encode(message))
            await self._writer.drain()
        except OSError as error:
            raise ShimGone(f"{self._directory}: {error}") from error

    async def close(self) -> None:
        """Leave the shim to itself."""
        if self._receiving is not None:
            self._receiving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._receiving
        if self._writer is not None:
            self._writer.close()
