"""Lists the devices of this machine without torch: NVIDIA GPUs through NVML, else the CPU.

CUDA_VISIBLE_DEVICES holds here as it holds for the engines, which inherit it: NVML itself does not look at it. Numbers
in it count by PCI bus id, since engines are started that way.

Run as `python -m gpu_service.devices <index>`, prints how many bytes of a GPU are held by nobody known; for a process
that must not hang where a driver does.

Refuses to guess: a driver that is absent means a CPU node, a driver that fails means a device in quarantine with the
driver's own words, and so does a CUDA_VISIBLE_DEVICES that names no GPU of this machine. Every call may block for a
moment; call it from a thread.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# What people write to hide all GPUs.
_HIDE_ALL = frozenset({"", "-1", "none", "NoDevFiles"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A device that runs can be placed on."""

    # 0-based, among those that an engine sees; -1 for the CPU.
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


class DeviceMemory:
    """Who tells what of a device's memory is held by nobody known: asked before an engine starts and behind its end."""

    def command(self, device: Device) -> tuple[str, ...]:
        """A program that prints it; empty where memory is the processes' own, and goes with them."""
        return (sys.executable, "-m", "gpu_service.devices", str(device.index)) if device.type == "cuda" else ()

    def held_bytes(self, index: int) -> int:
        """The same number, here. Blocks. 0 when the driver does not answer."""
        try:
            return read_held_bytes(index)
        except pynvml.NVMLError:
            return 0


ListDevices = Callable[[], Sequence[Device]]


def list_devices(*, nvml: Any = pynvml, environment: Mapping[str, str] = os.environ) -> Sequence[Device]:
    """The GPUs that an engine of ours can see when there is a driver, else the CPU. `nvml` has pynvml's functions."""
    visible = environment.get(_VISIBLE)
    if visible is not None and visible.strip() in _HIDE_ALL:
        return (read_cpu(),)
    try:
        nvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded, pynvml.NVMLError_NoPermission):
        return (read_cpu(),)
    except pynvml.NVMLError as error:
        return (_unreadable_gpu(0, error),)
    try:
        count = nvml.nvmlDeviceGetCount()
        numbers = list(range(count)) if visible is None else _visible_numbers(nvml, count, visible)
        gpus = [_read_gpu(nvml, number, index=index) for index, number in enumerate(numbers)]
    except pynvml.NVMLError as error:
        return (_unreadable_gpu(0, error),)
    finally:
        nvml.nvmlShutdown()
    if count and not gpus:
        return (_quarantined_gpu(0, f"{_VISIBLE}={visible} names no GPU of this machine"),)
    return gpus or (read_cpu(),)


def read_held_bytes(index: int, *, nvml: Any = pynvml, environment: Mapping[str, str] = os.environ) -> int:
    """Bytes in use on a GPU, numbered as engines see it, less what living processes hold that are known to the driver.

    Other people's processes come and go; what nobody holds and is not free is a dead process'. In a container that
    does not see them, theirs counts as nobody's. Raises pynvml.NVMLError.
    """
    nvml.nvmlInit()
    try:
        visible = environment.get(_VISIBLE)
        count = nvml.nvmlDeviceGetCount()
        numbers = list(range(count)) if visible is None else _visible_numbers(nvml, count, visible)
        handle = nvml.nvmlDeviceGetHandleByIndex(numbers[index] if index < len(numbers) else index)
        holders = {
            process.pid: int(process.usedGpuMemory or 0)
            for process in (
                *nvml.nvmlDeviceGetComputeRunningProcesses(handle),
                *nvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
            )
        }
        known = sum(held for pid, held in holders.items() if psutil.pid_exists(pid))
        return max(0, int(nvml.nvmlDeviceGetMemoryInfo(handle).used) - known)
    finally:
        nvml.nvmlShutdown()


def _visible_numbers(nvml: Any, count: int, visible: str) -> list[int]:
    """NVML's numbers of the devices that CUDA shows, in its order: up to the first entry that names none, as CUDA."""
    uuids = [_read_uuid(nvml, number) for number in range(count)]
    numbers: list[int] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdecimal():
            found = [int(entry)] if int(entry) < count else []
        else:
            # The beginning of a UUID is enough when no other device has it.
            found = [number for number, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(found) != 1 or found[0] in numbers:
            break
        numbers += found
    return numbers


def _read_uuid(nvml: Any, number: int) -> str:
    try:
        return _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(number)))
    except pynvml.NVMLError:
        # Nobody can name it by UUID, but its neighbors can be.
        return ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


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
    return _quarantined_gpu(index, f"the driver does not answer: {error}")


def _quarantined_gpu(index: int, reason: str) -> Device:
    return Device(
        index=index,
        type="cuda",
        name="NVIDIA GPU",
        total_memory_bytes=0,
        free_memory_bytes=0,
        quarantine_reason=reason,
    )


def _read_gpu(nvml: Any, number: int, *, index: int) -> Device:
    """`number` is NVML's, `index` is CUDA's."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        name = nvml.nvmlDeviceGetName(handle)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError as error:
        return _unreadable_gpu(index, error)
    return Device(
        index=index,
        type="cuda",
        name=_text(name),
        total_memory_bytes=int(memory.total),
        free_memory_bytes=int(memory.free),
        compute_capability=f"{major}.{minor}",
    )


def _main(arguments: Sequence[str]) -> int:
    try:
        sys.stdout.write(f"{read_held_bytes(int(arguments[0]))}\n")
    except pynvml.NVMLError as error:
        sys.stderr.write(f"the driver does not answer: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
