"""Where a step's time on the device goes: torch's profiler over a few steps, by kind of kernel.

Kinds are told by kernels' names. The steps are not counted in any rate.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

# The first that fits; names in lower case. Those that begin with a line are of triton, ours or a peer's.
KINDS: tuple[tuple[str, str], ...] = (
    ("dequantize", r"dequant|nf4|restore"),
    ("attention", r"flash|fmha|attention|sdpa|fwdsm90|bwdsm90|cudnn::fusion"),
    ("loss", r"cross_?entropy|nll|logsumexp|softmax|_ce_"),
    ("optimizer", r"adam|multi_tensor|foreach|^_copy_out"),
    ("rounding to 8 bits", r"^_round"),
    ("adapter", r"^_[a-z0-9_]*(adapter|rank|reduce_inner|reduce_b|drop_and)"),
    ("norm", r"rms|layer_?norm|^_[a-z0-9_]*norm"),
    ("rope and activation", r"rope|rotary|silu|swiglu|sigmoid|^_rotate|^_gate"),
    ("matrix products", r"nvjet|gemm|cutlass|xmma|cublas|splitk|gemv|scaled_mm|_mm_|matmul"),
    ("copies and casts", r"memcpy|memset|copy|cast|cat_|catarray|fill"),
)
OTHER = "other elementwise"
_MOST_KERNELS = 25
_NAME_CHARACTERS = 100


def kind_of(kernel: str) -> str:
    """Which of KINDS a kernel is, by its name, or OTHER."""
    name = kernel.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), OTHER)


def summarize(rows: Iterable[tuple[str, float, int]], steps: int, wall_seconds: float) -> dict[str, Any]:
    """`rows` are (kernel, microseconds in all, launches in all); milliseconds and launches a step, largest first."""
    kernels = sorted(((us / 1e3 / steps, count / steps, name) for name, us, count in rows if us > 0), reverse=True)
    kinds: dict[str, list[float]] = {}
    for milliseconds, launches, name in kernels:
        kind = kinds.setdefault(kind_of(name), [0.0, 0.0])
        kind[0] += milliseconds
        kind[1] += launches
    return {
        "steps": steps,
        "wall_milliseconds": round(1e3 * wall_seconds / steps, 2),
        "kernel_milliseconds": round(sum(row[0] for row in kernels), 2),
        "kinds": {
            kind: {"milliseconds": round(milliseconds, 2), "launches": round(launches)}
            for kind, (milliseconds, launches) in sorted(kinds.items(), key=lambda item: -item[1][0])
        },
        "kernels": [
            {"milliseconds": round(milliseconds, 3), "launches": round(launches, 1), "name": name[:_NAME_CHARACTERS]}
            for milliseconds, launches, name in kernels[:_MOST_KERNELS]
        ],
    }


class KernelProfile:
    """Runs from its making to `end`."""

    def __init__(self) -> None:
        import torch

        activities = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else None
        make_profiler: Any = torch.profiler.profile
        self._profiler = make_profiler(activities=activities)
        self._profiler.__enter__()
        self._began = time.perf_counter()

    def end(self, steps: int) -> dict[str, Any]:
        """What `steps` steps since came to; the device is idle when this is called."""
        wall_seconds = time.perf_counter() - self._began
        self._profiler.__exit__(None, None, None)
        rows = [
            (event.key, float(getattr(event, "self_device_time_total", 0.0)), int(event.count))
            for event in self._profiler.key_averages()
            if not event.key.startswith(("ProfilerStep", "Command Buffer", "cudaLaunch"))
        ]
        return summarize(rows, steps, wall_seconds)
