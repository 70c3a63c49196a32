"""The node's planners, as exec'd children: a request in, its answer out. A child is killed when nobody waits for it.

Refuses to read datasets or tokenizers itself, and knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gpu_service.domain.errors import Fault, Refusal
from gpu_service.oom_counter import oom_kills
from gpu_service.runs.room import full_disk_is_a_refusal
from gpu_service.runs.undisturbed import undisturbed
from gpu_service.shim import durable_json

_COMMAND = (sys.executable, "-m", "gpu_service.planner")
_MAX_LINE_BYTES = 4 * 1024 * 1024
_EXIT_REFUSED = 3


class PlannerProcess:
    """Runs planners by requests in one directory, where nothing is left when they ended."""

    def __init__(self, requests_directory: Path) -> None:
        self._requests_directory = requests_directory
        # Tokenizing takes all the processor that it can get, so one at a time; but a look at some rows is over at once.
        self._long = asyncio.Semaphore(1)
        self._short = asyncio.Semaphore(1)

    @asynccontextmanager
    async def turn(self, *, short: bool = False) -> AsyncIterator[None]:
        """Wait for and hold the one place for long work, or that for `short` work, which waits for no long one."""
        async with self._short if short else self._long:
            yield

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """No planner of this server works during the block; who wants one waits."""
        async with self._long, self._short:
            yield

    async def ask(self, request: Mapping[str, Any], *, answer: str) -> dict[str, Any]:
        """The planner's answer, whose `type` must be `answer`. Call it in a `turn`. Cancelling it kills the planner.

        Raises `Refusal`: the planner's own; when it ended without an answer, HOST_OUT_OF_MEMORY where the kernel killed
        it for memory, else PLANNING.
        """
        path = self._requests_directory / f"{uuid.uuid4().hex}.json"
        try:
            with full_disk_is_a_refusal("the planner's request"):
                await undisturbed(asyncio.to_thread(durable_json.write, path, request))
            return await self._run(path, answer)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def _run(self, path: Path, answer: str) -> dict[str, Any]:
        oom_kills_before = await asyncio.to_thread(oom_kills)
        process = await asyncio.create_subprocess_exec(
            *_COMMAND,
            str(path),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
        )
        try:
            output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        # Progress lines are for the engine's own run of the planner; the last line is the outcome.
        last = _last_message(output)
        if process.returncode == 0 and last.get("type") == answer:
            return last
        if process.returncode == _EXIT_REFUSED and last.get("type") == "refused":
            raise Refusal.from_failure(last["failure"])
        if process.returncode == -signal.SIGKILL and await asyncio.to_thread(oom_kills) > oom_kills_before:
            message = "the planner was killed by the kernel because the machine's memory ran out"
            raise Refusal("HOST_OUT_OF_MEMORY", Fault.HARDWARE, message, stage="PLANNING")
        raise planner_failed(
            f"the planner ended with status {process.returncode}: {errors.decode(errors='replace')[-2000:]}"
        )


def planner_failed(message: str) -> Refusal:
    """The refusal for a planner that did not do what it is there for."""
    return Refusal("PLANNING", Fault.PLATFORM, message, stage="PLANNING")


def _last_message(output: bytes) -> dict[str, Any]:
    """Empty when there is none, or when the planner's death cut it short."""
    lines = output.splitlines()
    try:
        message = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
