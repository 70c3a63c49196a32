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
