"""Chores on this machine that a service's own module does, run with this interpreter. Imports none of them."""

import subprocess
import sys
from collections.abc import Sequence

IMPORTING_MODULE = "gpu_service.engine.importing"
DOCTOR_MODULE = "gpu_service.doctor"
CONTROL_MODULE = "control_service"
GPU_MODULE = "gpu_service"


def module_command(module: str, arguments: Sequence[str]) -> list[str]:
    """The argv that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Runs a module in the foreground with this terminal, and gives its exit status."""
    return subprocess.run(module_command(module, arguments), check=False).returncode


def module_output(module: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Runs a module and gives its exit status and what it wrote to standard output."""
    done = subprocess.run(module_command(module, arguments), check=False, stdout=subprocess.PIPE, encoding="utf-8")
    return done.returncode, done.stdout
