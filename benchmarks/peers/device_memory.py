"""What the device holds and what it is, by NVML, without a context of its own on it."""

from __future__ import annotations

import sys
from typing import Any


class DeviceMemory:
    """What the whole device holds, by NVML; nothing where there is none."""

    def __init__(self) -> None:
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
        except (ImportError, OSError) as error:
            print(f"no NVML: {error}", file=sys.stderr)
            return
        except Exception as error:  # noqa: BLE001 - NVML's errors are classes made at run time, without a common module
            print(f"no NVML: {error}", file=sys.stderr)
            return
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    def used_bytes(self) -> int | None:
        """Bytes in use, or None without NVML."""
        return None if self._handle is None else int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def describe(self) -> dict[str, Any]:
        """Name and total memory, as the planner is told of a device."""
        if self._handle is None:
            return {"type": "cpu", "name": "cpu", "total_memory_bytes": 0, "free_memory_bytes": 0}
        name = self._nvml.nvmlDeviceGetName(self._handle)
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return {
            "type": "cuda",
            "name": name.decode() if isinstance(name, bytes) else name,
            "total_memory_bytes": int(memory.total),
            "free_memory_bytes": int(memory.free),
        }
