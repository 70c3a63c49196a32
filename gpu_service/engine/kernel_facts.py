"""Has Triton find out, while torch is imported, what it finds out once in each process before its first kernel.

The digest of its own files, by which compiled kernels are found (its library has hundreds of megabytes), the version of
its assembler, and where the driver's library lies: each is kept by Triton. These are names of its own, which may move;
what is not there is found out when it is needed. Needs no torch, and compiles nothing.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from gpu_service.engine.device_facts import DriverFailed, open_device
from gpu_service.engine.request import DeviceChoice

_LOG = logging.getLogger(__name__)
# The name moved, or what it is in needs something that is not there.
_NOT_FOUND = (ImportError, AttributeError)
# It takes other arguments by now, or did not find its program or library: it asks others, and asserts what they say.
_NO_ANSWER = (TypeError, OSError, AssertionError, RuntimeError, subprocess.SubprocessError)

# Name of the module, of its function, and what that takes of the device's compute capability (90 for 9.0).
_FACTS: Mapping[str, tuple[str, Callable[[int], tuple[Any, ...]]]] = {
    "triton.runtime.cache": ("triton_key", lambda capability: ()),
    "triton.backends.nvidia.driver": ("library_dirs", lambda capability: ()),
    "triton.backends.nvidia.compiler": ("get_ptxas_version", lambda capability: (capability,)),
}


def find_out(device: DeviceChoice) -> None:
    """What a first kernel on this GPU waits for, as far as Triton is there and has it."""
    try:
        major, minor = open_device(device)()["compute_capability"].split(".")
    except (OSError, DriverFailed) as error:
        _LOG.info("kernels are not prepared for: %s", error)
        return
    capability = int(major) * 10 + int(minor)
    for module, (function, arguments) in _FACTS.items():
        try:
            find = getattr(import_module(module), function)
        except _NOT_FOUND as error:
            _LOG.info("not found out ahead, %s.%s: %s: %s", module, function, type(error).__name__, error)
            continue
        try:
            find(*arguments(capability))
        except _NO_ANSWER as error:
            _LOG.info("not found out ahead, %s.%s: %s: %s", module, function, type(error).__name__, error)
    _LOG.info("Triton knows itself")
