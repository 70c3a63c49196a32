"""What captures on CUDA, where graphs are stood in for: what it does around a capture, whatever that comes to."""

from __future__ import annotations

import gc
import itertools
from contextlib import nullcontext

import pytest
import torch

from gpu_service.engine.fast_path.recorder import CudaRecorder


class _Graphs:
    """Stands in for CUDA's graphs: what was captured into which pool, and captures that come to nothing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.captures: list[object] = []
        self.ended_pools: list[object] = []
        self.is_invalid = False
        graphs, pools = self, itertools.count(1)

        class Graph:
            def __init__(self, keep_graph: bool = False) -> None:
                self.is_ready = False

            def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
                graphs.captures.append(pool)

            def capture_end(self) -> None:
                if graphs.is_invalid:
                    graphs.is_invalid = False
                    raise RuntimeError("operation failed due to a previous error during capture")

            def instantiate(self) -> None:
                self.is_ready = True

            def replay(self) -> None:
                assert self.is_ready

        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
        patch.setattr(torch.cuda, "Stream", lambda device: None)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        for name in ("synchronize", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: self.ended_pools.append(pool))
        patch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: None)


def test_a_capture_that_fails_is_ended_and_told_by_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pool is given up: torch would refuse to record into it again."""
    graphs = _Graphs(monkeypatch)
    recorder = CudaRecorder(torch.device("cpu"))
    recorder.record(lambda: None)()

    def wait() -> None:
        graphs.is_invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(wait)
    # A capture that ends well follows at once, in a pool of its own.
    assert graphs.captures == [1, 1, None]
    assert graphs.ended_pools == [1]
    recorder.record(lambda: None)()
    assert graphs.captures[3:] == [2]

    def invalidate() -> None:
        graphs.is_invalid = True

    with pytest.raises(RuntimeError, match="previous error"):
        recorder.record(invalidate)
    assert graphs.ended_pools == [1, 2]


def _fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_kernels_are_captured(collects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _Graphs(monkeypatch)
    recorder, seen = CudaRecorder(torch.device("cpu")), list[bool]()
    was_collecting = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        recorder.record(lambda: seen.append(gc.isenabled()))
        with pytest.raises(ZeroDivisionError):
            recorder.record(_fail)
        seen.append(gc.isenabled())
    finally:
        (gc.enable if was_collecting else gc.disable)()
    assert seen == [False, collects]
