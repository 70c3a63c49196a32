"""The GPU server with two devices that are not there. What nobody holds of each is the number in a file.

Run as `python -m tests.fakes.fake_device_server DIRECTORY [flags of the server]`; the files are DIRECTORY/held-0 and
DIRECTORY/held-1, and absent for 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_service.bootstrap import Application, build
from gpu_service.config import Settings
from gpu_service.devices import Device, DeviceMemory
from gpu_service.main import main

_TOTAL_BYTES = 8 << 30


def held_file(directory: Path, index: int) -> Path:
    return directory / f"held-{index}"


class _MemoryInFiles(DeviceMemory):
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def command(self, device: Device) -> tuple[str, ...]:
        return (sys.executable, __file__, str(held_file(self._directory, device.index)))

    def held_bytes(self, index: int) -> int:
        return _read(held_file(self._directory, index))


def _read(path: Path) -> int:
    return int(path.read_text()) if path.exists() else 0


def _serve(directory: Path, arguments: Sequence[str]) -> int:
    devices = [
        Device(
            index=index,
            type="cuda",
            name="no GPU",
            total_memory_bytes=_TOTAL_BYTES,
            free_memory_bytes=_TOTAL_BYTES,
            compute_capability="9.0",
        )
        for index in (0, 1)
    ]

    async def make(settings: Settings) -> Application:
        return await build(settings, devices=lambda: devices, memory_of_devices=_MemoryInFiles(directory))

    return main(arguments, make_application=make)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        # What a shim asks.
        sys.stdout.write(str(_read(Path(sys.argv[1]))))
    else:
        sys.exit(_serve(Path(sys.argv[1]), sys.argv[2:]))
