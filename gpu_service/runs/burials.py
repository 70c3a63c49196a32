"""Buries engines whose shims are gone, and keeps a device in quarantine while what its engine held is not free.

Tried again until it works: until then nobody may call the engine's run over. Refuses to kill anything itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from gpu_service.devices import DeviceMemory
from gpu_service.runs.quarantine import Quarantine
from gpu_service.runs.shim_client import ShimGone, bury
from gpu_service.shim import device_memory
from gpu_service.shim.closing import describe_held
from gpu_service.shim.configuration import FILE_NAME as ENGINE_FILE_NAME
from gpu_service.shim.configuration import EngineConfiguration, EngineDirectoryInvalid
from gpu_service.shim.records import ExitRecord

_log = structlog.get_logger(__name__)
_BURY_AGAIN_SECONDS = 2.0
_NO_IDS: Mapping[str, Any] = {}
_UNBURIED = "the shim of its engine is gone, and processes of the engine do not end"


class Burials:
    """`patience_seconds`: a burial that takes longer waits for processes that the kernel keeps."""

    def __init__(self, *, quarantine: Quarantine, memory: DeviceMemory, patience_seconds: float) -> None:
        self._quarantine = quarantine
        self._memory = memory
        self._patience_seconds = patience_seconds

    async def bury(self, directory: Path, stop_mode: str | None = None, ids: Mapping[str, Any] = _NO_IDS) -> None:
        """Until nothing of the engine lives and its run, which was asked to stop in this mode, is closed."""
        while True:
            try:
                await bury(directory, stop_mode)
                return
            except (ShimGone, OSError) as error:
                # A full disk, for one, gets free again; until then the run must not be called over.
                _log.error("burial-failed", engine=directory.name, error=str(error), **ids)
                await asyncio.sleep(_BURY_AGAIN_SECONDS)

    async def bury_of_device(
        self, directory: Path, device_id: str, stop_mode: str | None, ids: Mapping[str, Any]
    ) -> None:
        """As `bury`; the device comes under quarantine when it takes long."""
        burial = asyncio.create_task(self.bury(directory, stop_mode, ids))
        try:
            await asyncio.wait({burial}, timeout=self._patience_seconds)
            if not burial.done():
                self.quarantine(device_id)
            await burial
        finally:
            burial.cancel()

    def quarantine(self, device_id: str) -> None:
        """Until `look_at_device` says otherwise."""
        self._quarantine.impose(device_id, _UNBURIED, lambda: False)

    async def look_at_device(self, directory: Path, device_id: str, ending: ExitRecord) -> None:
        """The device of an engine that is gone: in quarantine while what it held is not free."""
        self._quarantine.lift(device_id)
        if not ending.held_bytes:
            return
        configuration = await asyncio.to_thread(EngineConfiguration.read, directory)
        self._quarantine.impose(device_id, describe_held(ending.held_bytes), partial(self._is_free, configuration))

    async def look_again_at_devices(self, directory: Path) -> None:
        """At a start: in quarantine is what the newest engine of a device did not give back, where that is not free
        yet. `directory` has the engines' directories.
        """
        for engine, configuration in (await asyncio.to_thread(_newest_of_each_device, directory)).items():
            ending = await asyncio.to_thread(ExitRecord.read, engine)
            # Without a record it lives, or is being buried.
            if ending is None or not ending.held_bytes or await asyncio.to_thread(self._is_free, configuration):
                continue
            device = configuration.device
            reason = describe_held(ending.held_bytes)
            self._quarantine.impose(
                f"{device['type']}:{device['index']}", reason, partial(self._is_free, configuration)
            )

    def _is_free(self, configuration: EngineConfiguration) -> bool:
        """Whether the device has what it had before that engine. Blocks for the driver."""
        held_bytes = self._memory.held_bytes(int(configuration.device["index"]))
        return held_bytes - configuration.device_memory_bytes <= device_memory.SLACK_BYTES


def _newest_of_each_device(directory: Path) -> dict[Path, EngineConfiguration]:
    newest: dict[tuple[str, int], tuple[Path, EngineConfiguration]] = {}
    # What an engine is started from is written once.
    for path in sorted(directory.glob(f"*/{ENGINE_FILE_NAME}"), key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(EngineDirectoryInvalid):
            configuration = EngineConfiguration.read(path.parent)
            device = configuration.device
            newest[(str(device["type"]), int(device["index"]))] = (path.parent, configuration)
    return dict(newest.values())
