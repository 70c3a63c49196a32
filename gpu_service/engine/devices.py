"""What the engine asks of a device: its torch name, its memory, its random state. CPU and CUDA, one class each.

The table at the end is the only place that knows which kinds there are.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from gpu_service import host_memory
from gpu_service.engine.device_facts import describe_cpu
from gpu_service.engine.request import DeviceChoice

_CLEAR_REFERENCES, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Device(Protocol):
    """A device that a run trains on."""

    @property
    def torch_device(self) -> torch.device: ...

    def make_current(self) -> None:
        """Have the calling thread launch its kernels here: Triton asks the thread, not the tensors."""
        ...

    def describe(self) -> dict[str, Any]:
        """`type`, `name`, `total_memory_bytes`, `free_memory_bytes`, and what else a plan asks of a kind of device."""
        ...

    def start_counting(self) -> None:
        """Forget earlier peaks."""
        ...

    def used_bytes(self) -> int:
        """Memory in use now: allocated on the device, or resident set size on a CPU."""
        ...

    def peak_bytes(self) -> int:
        """Highest use since `start_counting`."""
        ...

    def held_bytes(self) -> int:
        """What this process keeps others from having: on a device all that its allocator took, used or not."""
        ...

    def give_back(self) -> None:
        """Return what nothing refers to any more to the system."""
        ...


class CpuDevice:
    """The machine itself. Memory is this process' resident set size."""

    def __init__(self, choice: DeviceChoice) -> None:
        del choice
        self._process = psutil.Process()
        self._peak_bytes = 0
        self._kernel_counts = False

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def make_current(self) -> None:
        """Nothing: there is one CPU."""

    def describe(self) -> dict[str, Any]:
        return describe_cpu()

    def start_counting(self) -> None:
        # What loading has freed is no use of the run's.
        _trim_heap()
        self._peak_bytes = 0
        self._kernel_counts = _forget_highest()

    def used_bytes(self) -> int:
        used = int(self._process.memory_info().rss)
        self._peak_bytes = max(self._peak_bytes, used)
        return used

    def peak_bytes(self) -> int:
        self.used_bytes()
        if self._kernel_counts:
            # Within a step too, where nobody looks.
            self._peak_bytes = max(self._peak_bytes, _highest_bytes())
        return self._peak_bytes

    def held_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def give_back(self) -> None:
        gc.collect()
        _trim_heap()


def _trim_heap() -> None:
    """The C library keeps freed blocks for itself until it is told that they will not be wanted soon."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _forget_highest() -> bool:
    """Have the kernel begin anew with this process' highest resident set; False where it does not do that."""
    try:
        _CLEAR_REFERENCES.write_text("5")
    except OSError:
        return False
    return True


def _highest_bytes() -> int:
    """This process' highest resident set so far, as the kernel counts it; 0 where it does not say."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return 1024 * int(value.split()[0])
    return 0


class CudaDevice:
    """One CUDA device. Memory is what torch's allocator has handed out."""

    def __init__(self, choice: DeviceChoice) -> None:
        self._device = torch.device("cuda", max(choice.index, 0))

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def make_current(self) -> None:
        # As in `describe`: what is missing is said later.
        if torch.cuda.is_available():
            torch.cuda.set_device(self._device)

    def describe(self) -> dict[str, Any]:
        # A machine without CUDA still gets as far as the stage that needs it, which then says what is missing.
        if not torch.cuda.is_available():
            return {"type": "cuda", "name": str(self._device), "total_memory_bytes": 0, "free_memory_bytes": 0}
        free, total = torch.cuda.mem_get_info(self._device)
        name = torch.cuda.get_device_name(self._device)
        major, minor = torch.cuda.get_device_capability(self._device)
        return {
            "type": "cuda",
            "name": name,
            "total_memory_bytes": total,
            "free_memory_bytes": free,
            "host_memory_bytes": host_memory.total_bytes(),
            "compute_capability": f"{major}.{minor}",
        }

    def start_counting(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats(self._device)

    def used_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device) if torch.cuda.is_available() else 0

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if torch.cuda.is_available() else 0

    def held_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device) if torch.cuda.is_available() else 0

    def give_back(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize(self._device)
            # cuBLAS keeps 64 MiB of workspace on a Hopper card, taken from torch's allocator. torch has no public name
            # for giving it back; this is the one that its own CUDA graphs use.
            clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
            if clear_workspaces is not None:
                clear_workspaces()
            torch.cuda.empty_cache()


_KINDS: Mapping[str, Callable[[DeviceChoice], Device]] = {"cpu": CpuDevice, "cuda": CudaDevice}


def select(choice: DeviceChoice) -> Device:
    """The device of a run. Raises ValueError for a kind that the engine does not know."""
    if choice.type not in _KINDS:
        raise ValueError(f"no device of type {choice.type!r}; known: {', '.join(sorted(_KINDS))}")
    return _KINDS[choice.type](choice)
