"""One engine as the server sees it: its shim's connection, the run or generation it has, the base it keeps, and when it
got idle.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_service.domain.errors import Refusal
from gpu_service.runs.engine_directories import read_context
from gpu_service.runs.inference_stream import Generation, busy, lost
from gpu_service.runs.run import Run
from gpu_service.runs.shim_client import Message, ShimClient, ShimGone, is_alive

_LOOK_AGAIN_SECONDS = 0.05


class Engine:
    """From the shim's start, or its adoption, to its end."""

    def __init__(
        self,
        *,
        directory: Path,
        device_id: str,
        process: subprocess.Popen[bytes] | None,
        on_notice: Callable[[Engine, Message], None],
        answer_limit_seconds: float,
    ) -> None:
        """`process` is the shim when this server started it, None when it was adopted."""
        self._answer_limit_seconds = answer_limit_seconds
        self.directory = directory
        self.device_id = device_id
        self.run: Run | None = None
        # Handed to it, by id; those that were given up stay until it says that they are over.
        self.generations: dict[str, Generation] = {}
        self.resident: dict[str, Any] = {}
        self.idle_since = time.monotonic()
        # Since when its run was seen to be over without the engine having said so.
        self.lingers_since: float | None = None
        # Directory of the run that it last said to be over.
        self.last_finished: str | None = None
        # When its shim is asked next whether it lives; None while it is being asked.
        self.ask_at: float | None = 0.0
        self._was_ready = False
        # True once it was asked to leave: it takes no further run.
        self.leaving = False
        # Whether it was ever handed a run or a generation, by this server or one before it.
        self.had_work = False
        # What it holds of a device before it has any work; 0 where that was not measured.
        self.context_bytes = 0
        self._process = process
        self._on_notice = on_notice
        self._new_client()

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def is_idle(self) -> bool:
        return self.can_take_run and not self.generations

    @property
    def can_take_run(self) -> bool:
        """A generation is in no run's way."""
        return self.run is None and not self.leaving

    @property
    def held_bytes(self) -> int:
        """What it keeps on its device without work."""
        return int(self.resident.get("bytes") or 0) + self.context_bytes

    @property
    def is_spare(self) -> bool:
        """Idle, and without a base."""
        return self.is_idle and not self.resident

    def note_ready(self) -> bool:
        """Whether it is news that it came up."""
        is_news, self._was_ready = not self._was_ready, True
        return is_news

    def keeps(self, wanted: dict[str, str]) -> bool:
        """Whether a run on this base starts warm: no fact that both know differs."""
        known = {name: value for name, value in self.resident.items() if value}
        return all(known.get(name, value) == value for name, value in wanted.items())

    def _new_client(self) -> None:
        self.client = ShimClient(
            self.directory,
            lambda message: self._on_notice(self, message),
            answer_limit_seconds=self._answer_limit_seconds,
        )

    async def connect(self) -> Message:
        """Connect to the shim and give its status. Raises ShimGone."""
        await self.client.connect(self._process)
        status = await self.client.status()
        self.resident = dict(status.get("resident") or {})
        if self._process is None:
            # What a former server measured.
            self.context_bytes = await asyncio.to_thread(read_context, self.directory)
        elif status["state"] == "idle":
            # It may have said that it is ready before anybody listened.
            self._on_notice(self, {"type": "ready"})
        return status

    async def ask(self) -> str:
        """What the shim says is stuck; empty when nothing is. Raises ShimGone when it says nothing at all.

        It is asked twice: an answer that is there already may be read too late by a server that did not run itself.
        """
        try:
            status = await self.client.status()
        except ShimGone:
            if self.client.gone.is_set():
                raise
            status = await self.client.status()
        return str(status.get("stuck") or "")

    async def start(self, run: Run) -> None:
        """Hand the run over. Raises ShimGone."""
        self.run = run
        self.had_work = True
        self.lingers_since = None
        await self.client.send({"type": "start_run", "run_directory": str(run.directory)})

    async def generate(self, generation: Generation) -> None:
        """Hand the generation over. Raises ShimGone."""
        self.generations[generation.id] = generation
        self.had_work = True
        generation.over.clear()
        await self.client.send(
            {"type": "generate", "generation": generation.id, "request": str(generation.request_file)}
        )

    async def cancel_generation(self, generation_id: str | None) -> None:
        """Have this generation, or with None any, end at the next token. Raises ShimGone."""
        await self.client.send({"type": "cancel_generate", "generation": generation_id})

    async def give_up_generations(self) -> None:
        """For a run, which goes first: whoever reads them is told at once. Raises ShimGone."""
        for generation in self.generations.values():
            generation.fail(busy("a run needs the device"))
        if self.generations:
            await self.cancel_generation(None)

    def take_generated(self, message: Message) -> None:
        """A part of a generation, or its end."""
        if "resident" in message:
            self.resident = dict(message["resident"] or {})
        generation = self.generations.get(str(message["generation"]))
        if generation is None:
            return
        generation.take(message, engine_leaves=self.leaving)
        if message.get("done"):
            del self.generations[generation.id]
            self.idle_since = time.monotonic()

    def lose_generations(self, refusal: Refusal) -> None:
        """The engine will say no more of them."""
        for generation in self.generations.values():
            generation.fail(refusal)
            generation.over.set()
        self.generations.clear()

    async def stop(self, run: Run) -> None:
        """Pass on the stop that was asked for. Raises ShimGone."""
        await self.client.send(
            {
                "type": "stop_run",
                "run_directory": str(run.directory),
                "mode": run.stop_mode,
                "grace_seconds": run.stop_grace_seconds,
            }
        )

    async def shut_down(self, grace_seconds: float) -> None:
        """Ask the engine to leave, at a checkpoint when it has a run. Raises ShimGone."""
        self.leaving = True
        await self.client.send({"type": "shutdown", "grace_seconds": grace_seconds})

    def _make_up_for_notices(self, status: Message) -> None:
        """Those that came while there was no connection are lost; the status tells what they would have."""
        run = self.run
        if run is not None and status["run_directory"] != str(run.directory):
            notice = {"type": "run_finished", "run_directory": str(run.directory), "resident": status["resident"]}
            self._on_notice(self, notice)

    async def wait_until_gone(self) -> None:
        """Wait until no shim holds the directory; a connection that only broke is made again."""
        while True:
            await self.client.gone.wait()
            await self.client.close()
            self._new_client()
            if not await is_alive(self.directory):
                break
            try:
                await self.client.connect()
                self._make_up_for_notices(await self.client.status())
                if self.generations:
                    # What they said meanwhile is lost.
                    self.lose_generations(lost("the connection to the engine broke"))
                    await self.cancel_generation(None)
            except ShimGone:
                self.client.gone.set()
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        if self._process is not None:
            # It has ended, or is on its last instructions: this reaps it.
            await asyncio.to_thread(self._process.wait)
