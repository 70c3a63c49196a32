"""What a plan is told of a device, without torch: a run is planned while torch is being imported.

Of a GPU the driver is asked, which makes the device's context: the one that torch uses later, so what is free then is
free without it. Refuses to guess: where the driver does not answer there are no facts. Changes nothing of the
process' environment, which other threads read meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from gpu_service import host_memory, torch_build
from gpu_service.engine.request import DeviceChoice

_DRIVER = "libcuda.so.1"
_NAME_BYTES = 256
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


class DriverFailed(Exception):
    """A call of the CUDA driver did not succeed."""


def describe_cpu() -> dict[str, Any]:
    """As the machine is now."""
    memory = psutil.virtual_memory()
    return {
        "type": "cpu",
        "name": "cpu",
        "total_memory_bytes": int(memory.total),
        "free_memory_bytes": int(memory.available),
        "has_cuda_build": torch_build.has_cuda(),
    }


class _Machine:
    def describe(self) -> dict[str, Any]:
        return describe_cpu()


class _Gpu:
    """A device of the driver's, with its context made. Kept for as long as the process lives."""

    def __init__(self, index: int, driver: Any) -> None:
        self._driver = driver
        self._call("cuInit", 0)
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), index)
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    def describe(self) -> dict[str, Any]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        # The driver asks the thread which context is meant.
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", name, _NAME_BYTES, self._device)
        return {
            "type": "cuda",
            "name": name.value.decode(),
            "total_memory_bytes": total.value,
            "free_memory_bytes": free.value,
            "host_memory_bytes": host_memory.total_bytes(),
            "compute_capability": f"{self._attribute(_CAPABILITY_MAJOR)}.{self._attribute(_CAPABILITY_MINOR)}",
        }

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            raise DriverFailed(f"{name} gave {status}")


def open_device(
    choice: DeviceChoice, *, load_driver: Callable[[str], Any] = ctypes.CDLL
) -> Callable[[], dict[str, Any]]:
    """What describes the device, as `Device.describe` does; a GPU's context is made now, which takes a while.

    `describe` raises DriverFailed; this DriverFailed too, OSError where there is no driver, and ValueError for a kind
    of device that nobody knows.
    """
    if choice.type not in _KINDS:
        raise ValueError(f"no device of type {choice.type!r}; known: {', '.join(sorted(_KINDS))}")
    device: _Machine | _Gpu = _KINDS[choice.type](max(choice.index, 0), load_driver)
    return device.describe


_KINDS: Mapping[str, Callable[[int, Callable[[str], Any]], _Machine | _Gpu]] = {
    "cpu": lambda index, load_driver: _Machine(),
    "cuda": lambda index, load_driver: _Gpu(index, load_driver(_DRIVER)),
}
