"""Measures the memory of a planned run: two steps on its largest batches, in a process that ends with them.

The device is the probe's while it lasts, as it would be a run's, and no warm engine is used. Whatever becomes of the
call, the process and everything that it wrote are gone afterwards. Refuses to plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from gpu_service import host_memory
from gpu_service.devices import Device
from gpu_service.domain.errors import Fault, Refusal
from gpu_service.domain.memory import MemoryLedger, check_host_room
from gpu_service.runs.engine_directories import ENGINE_ENVIRONMENT
from gpu_service.runs.memory_records import MemoryRecords
from gpu_service.runs.planning import PlannedRun, Planning
from gpu_service.runs.room import full_disk_is_a_refusal
from gpu_service.runs.undisturbed import undisturbed
from gpu_service.shim import durable_json

_log = structlog.get_logger(__name__)
_COMMAND = (sys.executable, "-m", "gpu_service.engine.probe")
_LOG_TAIL_BYTES = 2000


class MemoryProber:
    """One probe per device at a time."""

    def __init__(
        self,
        *,
        planning: Planning,
        ledger: MemoryLedger,
        records: MemoryRecords,
        directory: Path,
        make_room: Callable[[str], Awaitable[None]],
        on_release: Callable[[], None],
        limit_seconds: float = 1800.0,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        """`directory` outlives no server. `make_room(device_id)` has an idle engine leave; `on_release` is called when
        the device can be had again.
        """
        self._planning = planning
        self._ledger = ledger
        self._records = records
        self._directory = directory
        self._make_room = make_room
        self._on_release = on_release
        self._limit_seconds = limit_seconds
        self._command = command

    async def plan_and_probe(self, spec: Mapping[str, Any], device: Device) -> dict[str, Any]:
        """The exact plan with `memory_probe`, as proto JSON.

        Raises `Refusal` as planning does, NODE_BUSY when the device is taken, or memory of the host that it needs,
        MEMORY_PROBE (details `cause`) when the steps could not be made.
        """
        key = f"probe-{uuid.uuid4().hex}"
        # Before planning, which may take long: the probe must not come to nothing behind it.
        self._ledger.reserve(run_id=key, device_id=device.id, num_bytes=0, capacity_bytes=0)
        try:
            async with self._planning.planned(spec, device) as planned:
                await self._take_host_memory(key, device, int(planned.plan["memory"]["host_bytes"]))
                start = time.monotonic()
                await self._make_room(device.id)
                measured = await self._measure(self._directory / key, spec, planned, device)
                seconds = time.monotonic() - start
        finally:
            self._ledger.release(key)
            self._on_release()
        memory = planned.plan["memory"]
        await self._records.observe(
            planned.kind_of_run,
            analytic_bytes=int(memory["analytic_bytes"]),
            peak_bytes=int(measured["peak_bytes"]),
        )
        _log.info("memory-probed", device=device.id, peak_bytes=measured["peak_bytes"], seconds=seconds)
        probe = {
            "peak_bytes": str(measured["peak_bytes"]),
            "predicted_bytes": memory["peak_bytes"],
            "step_tokens": str(measured["step_tokens"]),
            "longest_tokens": str(measured["longest_tokens"]),
            "seconds": seconds,
        }
        return {**planned.plan, "memory_probe": probe}

    async def _take_host_memory(self, key: str, device: Device, host_bytes: int) -> None:
        """What runs beside it must not count on. Raises `Refusal` NODE_BUSY."""
        total_bytes = await asyncio.to_thread(host_memory.total_bytes)
        taken_bytes = self._ledger.host_bytes_beside({key})
        check_host_room(host_bytes, taken_bytes=taken_bytes, total_bytes=total_bytes, device_id=device.id)
        self._ledger.note_host_bytes(key, host_bytes)

    async def _measure(
        self, directory: Path, spec: Mapping[str, Any], planned: PlannedRun, device: Device
    ) -> dict[str, Any]:
        request = {
            "job_id": "probe",
            "attempt": 1,
            "spec_digest": "",
            "spec": dict(spec),
            "weights_digest": planned.plan.get("weights_digest", ""),
            "model_directory": planned.model_directory,
            "blobs_directory": planned.blobs_directory,
            "cache_directory": planned.cache_directory,
            "device": {"type": device.type, "index": device.index},
            "resume": None,
            "plan_directory": planned.plan_directory,
        }
        try:
            with full_disk_is_a_refusal("the probe's request"):
                await undisturbed(asyncio.to_thread(_write, directory, request))
            return await self._run(directory)
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def _run(self, directory: Path) -> dict[str, Any]:
        with (directory / "probe.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(directory),
                # It ends when this pipe does, so a server that is killed leaves no probe behind.
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **ENGINE_ENVIRONMENT, "TUNESMITH_ENGINE_DIRECTORY": str(directory)},
            )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(self._limit_seconds):
                output = await process.stdout.read()
                await process.wait()
        except TimeoutError:
            raise _failed(f"no answer within {self._limit_seconds:g} s", "DEADLINE_TOO_SHORT") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
        answer = _last_message(output)
        if answer.get("type") == "measured":
            return answer
        if answer.get("type") == "failed":
            raise _failed(str(answer["message"]), str(answer["reason"]), stage=str(answer.get("stage", "")))
        tail = await asyncio.to_thread(_tail, directory / "probe.log")
        cause = "ENGINE_KILLED" if (process.returncode or 0) < 0 else "ENGINE_EXITED"
        raise _failed(f"the probe ended with status {process.returncode}: {tail}", cause)


def _write(directory: Path, request: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True)
    durable_json.write(directory / "run.json", request)


def _tail(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        return stream.read().decode(errors="replace")


def _last_message(output: bytes) -> dict[str, Any]:
    """The answer is the last line; empty when a death cut it short, or libraries wrote something else."""
    lines = output.splitlines()
    try:
        message = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _failed(message: str, cause: str, *, stage: str = "") -> Refusal:
    fault = Fault.HARDWARE if cause.endswith("OUT_OF_MEMORY") else Fault.PLATFORM
    return Refusal("MEMORY_PROBE", fault, f"the memory probe failed: {message}", stage=stage, details={"cause": cause})
