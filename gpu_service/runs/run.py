"""One run as the server knows it: what was asked for, and what its journal says so far.

Reads the journal in threads, never writes it. Refuses to queue events for anyone: watchers read by cursor and are
woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_service.domain.run_state import RunState, shown_state
from gpu_service.journal import Reader, Record, RunSummary
from gpu_service.runs.node_files import RunKey
from gpu_service.runs.signal import Signal, wait_for
from gpu_service.runs.threads import finish_in_thread
from tunesmith.common.v1 import event_pb2

# Watchers are woken by the engine's notices; this is for a notice that was lost with its shim.
_LOOK_ANYWAY_SECONDS = 2.0
_AGAIN_SECONDS = 0.004
_BATCH_EVENTS = 256
# An engine maps its plan and tokens before the first of these.
_PHASES_BEHIND_THE_PLAN = frozenset({event_pb2.PHASE_EVALUATING, event_pb2.PHASE_TRAINING, event_pb2.PHASE_SAVING})
_BATCH_BYTES = 1024 * 1024


class Run:
    """An accepted attempt, from `run.json` to its release."""

    def __init__(self, *, directory: Path, content: dict[str, Any], on_change: Callable[[], None]) -> None:
        """`content` is that of `run.json`; `on_change` is called when state, phase or files changed, not for each
        step.
        """
        self.key = RunKey(
            installation_id=content["installation_id"], job_id=content["job_id"], attempt=int(content["attempt"])
        )
        self.directory = directory
        self.content = content
        self.spec_digest: str = content["spec_digest"]
        self.weights_digest: str = content["weights_digest"]
        self.device_id = f"{content['device']['type']}:{content['device']['index']}"
        self.summary = RunSummary()
        # Mode of the stop that was asked for; it is carried out as soon as an engine has the run.
        self.stop_mode: str | None = None
        self.stop_grace_seconds = 0.0
        self.released = False
        self.changed = Signal()
        self._on_change = on_change
        self._working = RunSummary()
        self._reader: Reader | None = None
        self._reading = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._dirty = False

    @property
    def is_over(self) -> bool:
        return self.summary.is_over

    @property
    def log_ids(self) -> dict[str, Any]:
        """What every log line about it carries."""
        return {"job_id": self.key.job_id, "attempt": self.key.attempt}

    @property
    def spec(self) -> dict[str, Any]:
        """`TrainingSpec` as proto JSON."""
        spec: dict[str, Any] = self.content["spec"]
        return spec

    @property
    def host_bytes(self) -> int:
        """What it locks of the host's memory: at most, before it is planned; nothing once it is over."""
        if self.is_over:
            return 0
        planned = self.summary.host_bytes
        return int(self.content.get("host_bytes") or 0) if planned is None else planned

    @property
    def may_plan(self) -> bool:
        """Whether its planner may be at work, or its plan not be opened yet."""
        return self.summary.phase not in _PHASES_BEHIND_THE_PLAN

    @property
    def state(self) -> RunState:
        return shown_state(RunState(self.summary.state), stop_requested=self.stop_mode is not None)

    def wake(self) -> None:
        """There is probably something new in the journal; many calls at once cost one reading."""
        self._dirty = True
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh_while_dirty(), name=f"refresh-{self.key.id}")

    async def _refresh_while_dirty(self) -> None:
        while self._dirty:
            self._dirty = False
            await self.refresh()
            if self._dirty:
                # Steps that follow each other so closely are read together: each reading is a turn of a thread.
                await asyncio.sleep(_AGAIN_SECONDS)

    async def refresh(self) -> None:
        """Take in what the journal has by now. Raises OSError, JournalDamaged."""
        async with self._reading:
            if self.released:
                return
            summary = await asyncio.to_thread(self._read_on)
        before, self.summary = self.summary, summary
        if summary.last_run_sequence != before.last_run_sequence:
            self.changed.fire()
        if _headline(summary) != _headline(before):
            self._on_change()

    def _read_on(self) -> RunSummary:
        if self._reader is None:
            try:
                self._reader = Reader(self.directory / "journal")
            except FileNotFoundError:
                return replace(self._working)
        while records := self._reader.read(self._working.last_run_sequence, limit=4096):
            for record in records:
                self._working.apply(record.decode())
        # A copy: the original goes on changing in threads.
        return replace(
            self._working, artifacts=dict(self._working.artifacts), checkpoints=dict(self._working.checkpoints)
        )

    def note_stop(self, mode: str, grace_seconds: float) -> None:
        """Remember that a stop was asked for; a cancel is never taken back."""
        if self.stop_mode != "cancel":
            self.stop_mode = mode
        self.stop_grace_seconds = grace_seconds
        self._on_change()

    async def wait_until_over(self) -> None:
        """Wait for the terminal event."""
        while not self.is_over and not self.released:
            changed = self.changed.current()
            if not self.is_over:
                await wait_for(changed, _LOOK_ANYWAY_SECONDS)

    async def follow(self, after: int) -> AsyncGenerator[list[Record], None]:
        """Records above a run sequence in batches, history then tail; ends with the last record of a run that is
        over.
        """
        reader: Reader | None = None
        try:
            while not self.released:
                changed = self.changed.current()
                if reader is None and self.summary.last_run_sequence:
                    reader = await asyncio.to_thread(Reader, self.directory / "journal")
                records = await finish_in_thread(reader.read, after, _BATCH_EVENTS, _BATCH_BYTES) if reader else []
                if records:
                    after = records[-1].run_sequence
                    yield records
                elif self.is_over and after >= self.summary.last_run_sequence:
                    return
                else:
                    await wait_for(changed, _LOOK_ANYWAY_SECONDS)
        finally:
            if reader is not None:
                reader.close()

    async def close(self) -> None:
        """Let go of the journal; the run is not read any more, and its watchers end."""
        self.released = True
        self.changed.fire()
        # Never close a file that a thread is reading.
        async with self._reading:
            if self._reader is not None:
                self._reader.close()
                self._reader = None


def _headline(summary: RunSummary) -> tuple[object, ...]:
    return summary.state, summary.phase, summary.host_bytes, tuple(summary.checkpoints), tuple(summary.artifacts)
