"""Whether the fast path's kernels can be compiled here: what Triton needs for it, a C compiler first, may be missing.

Found out by one small kernel, before anything is planned on it. Refuses to repair anything, and to guess from an
error's words.
"""

from __future__ import annotations

import subprocess
import sys

import torch

from gpu_service.engine.fast_path.operations import operations_for

_SIDE = 64


def errors() -> tuple[type[Exception], ...]:
    """What means, beyond doubt, that a kernel was not compiled: Triton's own, and those of programs that it runs."""
    # Not imported for it: what never was has raised nothing.
    triton = sys.modules.get("triton.errors")
    return (subprocess.SubprocessError, *(() if triton is None else (triton.TritonError,)))


def _of_a_first_kernel() -> tuple[type[Exception], ...]:
    """What one small kernel can fail with; a device that is lost will say so again."""
    return (RuntimeError, OSError, ImportError, *errors())


def describe(error: Exception) -> str:
    """In a line, for a plan and a log."""
    if isinstance(error, subprocess.CalledProcessError):
        # The whole command is no line.
        program = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return f"{type(error).__name__}: {program} ended with status {error.returncode}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


def find_problem(device: torch.device) -> str:
    """Why kernels cannot be compiled for the device; empty where they can, and where none are: on a CPU.

    Memory that ran out says nothing of kernels: whoever needs it then is told.
    """
    if device.type != "cuda":
        return ""
    try:
        operations = operations_for(device)
        matrix = torch.zeros(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
        copies = operations.prepare_copies([(0, matrix, 1.0)])
        operations.copy_out(torch.zeros(_SIDE * _SIDE, device=device), copies)
    except torch.OutOfMemoryError:
        return ""
    except _of_a_first_kernel() as error:
        return describe(error)
    return ""
