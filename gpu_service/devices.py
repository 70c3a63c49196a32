"""Lists the devices of this machine without torch: NVIDIA GPUs through NVML, else the CPU.

Refuses to guess: a driver that is absent means a CPU node, a driver that fails means a device in quarantine with the
driver's own words. Every call may block for a moment; call it from a thread.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A device that runs can be placed on."""

    # 0-based; -1 for the CPU.
    index: int
    # `cuda` or `cpu`.
    type: str
    name: str
    total_memory_bytes: int
    free_memory_bytes: int
    # `major.minor` of a CUDA device; empty for the CPU.
    compute_capability: str = ""
    # Why it is not to be used; empty when it is.
    quarantine_reason: str = ""

    @property
    def id(self) -> str:
        return f"{self.type}:{self.index}"


ListDevices = Callable[[], Sequence[Device]]


def list_devices() -> Sequence[Device]:
    """GPUs when there is a driver, else the CPU."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded, pynvml.NVMLError_NoPermission):
        return (read_cpu(),)
    except pynvml.NVMLError as error:
        return (_unreadable_gpu(0, error),)
    try:
        gpus = [_read_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    return gpus or (read_cpu(),)


def read_cpu() -> Device:
    """The machine's processors and memory as one device."""
    memory = psutil.virtual_memory()
    return Device(
        index=-1,
        type="cpu",
        name=_cpu_name(),
        total_memory_bytes=memory.total,
        free_memory_bytes=memory.available,
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() or "cpu"
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine() or "cpu"


def _unreadable_gpu(index: int, error: pynvml.NVMLError) -> Device:
    return Device(
        index=index,
        type="cuda",
        name="NVIDIA GPU",
        total_memory_bytes=0,
        free_memory_bytes=0,
        quarantine_reason=f"the driver does not answer: {error}",
    )


def _read_gpu(index: int) -> Device:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = pynvml.nvmlDeviceGetName(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError as error:
        return _unreadable_gpu(index, error)
    return Device(
        index=index,
        type="cuda",
        name=name.decode() if isinstance(name, bytes) else str(name),
        total_memory_bytes=int(memory.total),
        free_memory_bytes=int(memory.free),
        compute_capability=f"{major}.{minor}",
    )
