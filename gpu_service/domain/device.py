"""A device as planning sees it. Asks no driver: the server or the engine says what there is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Device:
    """`type` is `cuda` or `cpu`. 0 bytes means not known; `compute_capability` is `major.minor`, empty if not known.

    `host_memory_bytes` is all that the machine's processes may have. `kernel_problem` is why an engine there cannot
    compile kernels; empty where it can, or was not asked. `has_cuda_build`: an engine's torch is a build for CUDA,
    whose libraries take memory of a CPU's process too.
    """

    type: str = "cpu"
    name: str = "cpu"
    total_memory_bytes: int = 0
    free_memory_bytes: int = 0
    compute_capability: str = ""
    host_memory_bytes: int = 0
    kernel_problem: str = ""
    has_cuda_build: bool = False

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Device":
        """Reads the `device` object of a planner request; further keys are passed over."""
        return cls(
            type=str(value.get("type", "cpu")),
            name=str(value.get("name") or value.get("type") or "cpu"),
            total_memory_bytes=int(value.get("total_memory_bytes") or 0),
            free_memory_bytes=int(value.get("free_memory_bytes") or 0),
            compute_capability=str(value.get("compute_capability") or ""),
            host_memory_bytes=int(value.get("host_memory_bytes") or 0),
            kernel_problem=str(value.get("kernel_problem") or ""),
            has_cuda_build=bool(value.get("has_cuda_build")),
        )

    @property
    def has_float8(self) -> bool:
        """Compute capability 9.0 or newer; a CUDA device whose capability is not known is taken to be."""
        major = self.compute_capability.partition(".")[0]
        return self.type == "cuda" and (not major.isdecimal() or int(major) >= 9)

    @property
    def has_bfloat16(self) -> bool:
        """Compute capability 8.0 or newer; a CUDA device whose capability is not known is taken to be."""
        if self.type != "cuda":
            return False
        major = self.compute_capability.partition(".")[0]
        return not major.isdecimal() or int(major) >= 8

    @property
    def has_kernels(self) -> bool:
        """Whether the fast path's kernels run there; a CPU has references of them."""
        return self.type != "cuda" or (self.has_bfloat16 and not self.kernel_problem)
