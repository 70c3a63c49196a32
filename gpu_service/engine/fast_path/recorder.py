"""Records what is launched on a device so that one launch plays it again, and measures both. CUDA graphs on CUDA.

Knows nothing of what it records; what plays must find its numbers where they lay when it was recorded.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class Took:
    """Seconds until the host had handed everything out, and until it was done."""

    handing_out: float
    whole: float


class Recorder(Protocol):
    """Records what is launched, and measures it."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What plays `work`'s kernels again. `work` was run before, so that nothing of it is compiled now."""
        ...

    def time(self, work: Callable[[], None]) -> Took:
        """Run `work` alone on the device, and wait for its end."""
        ...

    def taken_bytes(self, work: Callable[[], None]) -> int:
        """Run `work`: device memory that it takes beside what stood before, at its highest moment."""
        ...

    def held_bytes(self) -> int:
        """Device memory that recordings have for themselves, whether they are played or not."""
        ...

    def free_bytes(self) -> int:
        """Device memory that nobody holds."""
        ...


class CudaRecorder:
    """CUDA graphs, which share one pool of memory: they never run beside each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # No work is captured on the stream that all else runs on.
        self._stream = torch.cuda.Stream(device)
        # What the pool has grown by: it shrinks with the last recording alone.
        self._held_bytes = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        # Made ready to be played by itself, so that it is capturing that failed where its end does.
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # What cuBLAS works in would otherwise be memory that is given to others when it is given back. What was
        # launched one by one has its memory cached, and a recording has memory of its own.
        before = self._clear_cache()
        with torch.cuda.stream(self._stream), _nothing_collected():
            # Other threads of the engine go on; what they do is not recorded.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                # What the end of the capture fails of then is this.
                with suppress(RuntimeError):
                    self._end_capture(graph)
                raise
            else:
                self._end_capture(graph)
            finally:
                # While a recording is made, nothing that it frees is given back to the device.
                self._held_bytes += max(torch.cuda.memory_reserved(self._device) - before, 0)
        _drop_workspaces()
        graph.instantiate()
        return graph.replay

    def _end_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        """Raises RuntimeError where there is nothing to play. Torch leaves such a capture half ended: its allocator
        frees nothing that two streams use, its generator makes no numbers until a capture ended well, and locked memory
        takes the pool for one in use.
        """
        try:
            graph.capture_end()
        except RuntimeError:
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
            _drop_workspaces()
            self._pool = torch.cuda.graph_pool_handle()
            another = torch.cuda.CUDAGraph()
            another.capture_begin(capture_error_mode="thread_local")
            torch.zeros((), device=self._device)
            another.capture_end()
            raise

    def time(self, work: Callable[[], None]) -> Took:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        work()
        handed_out = time.perf_counter()
        torch.cuda.synchronize(self._device)
        return Took(handing_out=handed_out - start, whole=time.perf_counter() - start)

    def taken_bytes(self, work: Callable[[], None]) -> int:
        # By what the allocator takes from the device: its own count of peaks is the run's, and not to be begun anew.
        before = self._clear_cache()
        work()
        return max(torch.cuda.memory_reserved(self._device) - before, 0)

    def held_bytes(self) -> int:
        return self._held_bytes

    def free_bytes(self) -> int:
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        # What lies in the recordings' pool is free to them alone.
        return torch.cuda.mem_get_info(self._device)[0] + max(cached - self._held_bytes, 0)

    def _clear_cache(self) -> int:
        """Give back what nothing lies in; the bytes that the allocator has then."""
        torch.cuda.synchronize(self._device)
        _drop_workspaces()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What a collection frees on the way may be waited for, or given back to the device: neither can be captured."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _drop_workspaces() -> None:
    # Without a public name in torch, which does the same around graphs of its own.
    clear: Any = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
