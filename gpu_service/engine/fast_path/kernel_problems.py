"""Whether the fast path's kernels can be compiled here: what Triton needs for it, a C compiler first, may be missing.

Found out by one small kernel, before anything is planned on it. Refuses to repair anything, and to guess from an
error's words: what is no proof leaves the question open.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import traceback

import torch

from gpu_service.engine.fast_path.operations import first_launches, operations_for

_LOG = logging.getLogger(__name__)
_SIDE = 64
# Triton's modules that look for the programs it runs, and run them. One that is missing is a plain RuntimeError there,
# or what the system says of a file that is not.
_FINDS_PROGRAMS = ("triton.runtime.build", "triton.knobs")


def errors() -> tuple[type[Exception], ...]:
    """What means, beyond doubt, that a kernel was not compiled: Triton's own, and those of programs that it runs."""
    # Not imported for it: what never was has raised nothing.
    triton = sys.modules.get("triton.errors")
    return (subprocess.SubprocessError, *(() if triton is None else (triton.TritonError,)))


def _of_a_first_kernel() -> tuple[type[Exception], ...]:
    """What one small kernel can fail with; a device that is lost will say so again."""
    return (RuntimeError, OSError, ImportError, *errors())


def _is_proof(error: Exception) -> bool:
    """Whether the next attempt would fail as this one did: a device or a disk that is full now is none."""
    if isinstance(error, (ImportError, *errors())):
        return True
    if not isinstance(error, (RuntimeError, FileNotFoundError)):
        return False
    modules = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module in _FINDS_PROGRAMS for module in modules)


def describe(error: Exception) -> str:
    """In a line, for a plan and a log."""
    if isinstance(error, subprocess.CalledProcessError):
        # The whole command is no line.
        program = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return f"{type(error).__name__}: {program} ended with status {error.returncode}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


def find_problem(device: torch.device) -> str | None:
    """Why kernels cannot be compiled for the device; empty where they can, and where none are: on a CPU.

    None where that is still not known: memory that ran out, or a disk, says nothing of kernels. Whoever needs it then
    is told.
    """
    if device.type != "cuda":
        return ""
    try:
        with first_launches:
            operations = operations_for(device)
            matrix = torch.zeros(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
            copies = operations.prepare_copies([(0, matrix, 1.0)])
            operations.copy_out(torch.zeros(_SIDE * _SIDE, device=device), copies)
    except _of_a_first_kernel() as error:
        if _is_proof(error):
            return describe(error)
        _LOG.warning("not known whether kernels can be compiled: %s", describe(error))
        return None
    return ""
