"""What this node measured of its own memory estimates, kept in `memory.json` of its data directory.

Runs that made every pass of their plan, and probes, add to it; plans are calibrated by it. It holds a bounded number of
numbers, and one that cannot be read, or whose numbers mean something else, is begun anew: it can be measured again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import structlog

from gpu_service.domain.memory_calibration import MAX_KINDS, VERSION, Calibration
from gpu_service.runs.run import Run
from gpu_service.shim import durable_json
from tunesmith.common.v1 import event_pb2

_log = structlog.get_logger(__name__)


class MemoryRecords:
    """Calibrations by kind of run, oldest first."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises OSError."""
        self._path = path
        self._by_kind = _read(path)
        self._writing = asyncio.Lock()

    def all(self) -> Mapping[str, Calibration]:
        """Everything that was measured, by kind of run."""
        return dict(self._by_kind)

    def of_kind(self, kind: str) -> dict[str, list[list[int]]]:
        """What a planner is told: the measurements of one kind, under its name; empty when there are none."""
        found = self._by_kind.get(kind)
        return {kind: found.to_json()} if found is not None else {}

    async def learn(self, run: Run) -> None:
        """Take in what a run that is over measured, if it tells anything."""
        measured = run.summary.memory_measured
        kind = str(run.content.get("kind_of_run") or "")
        if run.summary.state == event_pb2.RUN_STATE_SUCCEEDED and measured is not None and kind:
            await self.observe(kind, analytic_bytes=measured.analytic_bytes, peak_bytes=measured.peak_bytes)

    async def observe(self, kind: str, *, analytic_bytes: int, peak_bytes: int) -> None:
        """Keep a measurement; `analytic_bytes` is what arithmetic had said, 0 when the peak tells nothing."""
        if analytic_bytes <= 0 or peak_bytes <= 0:
            return
        async with self._writing:
            known = self._by_kind.get(kind, Calibration())
            others = [(name, cells) for name, cells in self._by_kind.items() if name != kind]
            self._by_kind = dict([*others, (kind, known.with_cell(analytic_bytes, peak_bytes))][-MAX_KINDS:])
            content = {"version": VERSION, "kinds": {name: item.to_json() for name, item in self._by_kind.items()}}
            try:
                await asyncio.to_thread(durable_json.write, self._path, content)
            except OSError as error:
                # A full disk must not fail a run that is over; the next measurement writes everything again.
                _log.error("memory-records-not-written", error=str(error))
        _log.info("memory-measured", kind=kind, predicted_bytes=analytic_bytes, peak_bytes=peak_bytes)


def _read(path: Path) -> dict[str, Calibration]:
    try:
        content = durable_json.read(path)
        if content is None or content.get("version") != VERSION:
            return {}
        return {str(kind): Calibration.from_json(cells) for kind, cells in content["kinds"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _log.error("memory-records-unreadable", file=str(path), error=str(error))
        return {}
