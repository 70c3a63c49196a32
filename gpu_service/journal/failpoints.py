"""Named places in the node's code where a test has a process die, stop, wait or meet an error. Off unless switched on.

`TUNESMITH_FAILPOINTS` names a directory. A file `armed/<name>` in it, a JSON object with `action` and what the action
needs, is taken by the first process that comes by, and carried out there. Without the variable nothing happens.
Server, shim, planner and engine all have it, which is why it lies in the one package that all of them may import.
Refuses names that are not declared here: a place that nothing can arm proves nothing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ENVIRONMENT_VARIABLE = "TUNESMITH_FAILPOINTS"

# Every failpoint, and between what and what it lies. A test holds this table to the calls in the code, both ways.
DECLARED: Mapping[str, str] = {}


def _kill(_order: Mapping[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(_order: Mapping[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _sleep(order: Mapping[str, Any]) -> None:
    time.sleep(float(order["seconds"]))


def _raise(order: Mapping[str, Any]) -> None:
    number = int(order["errno"])
    raise OSError(number, os.strerror(number))


def _exit(order: Mapping[str, Any]) -> None:
    os._exit(int(order["status"]))


# `{"action": "kill"}`, `{"action": "raise", "errno": 28}`, `{"action": "sleep", "seconds": 5}`; with `"after": n` the
# n-th time that one process comes by, from 1.
_ACTIONS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "kill": _kill,
    "stop": _stop,
    "sleep": _sleep,
    "raise": _raise,
    "exit": _exit,
}

_DIRECTORY = os.environ.get(ENVIRONMENT_VARIABLE)
_times_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Do what is armed here; nothing where nothing is. Raises OSError when that is armed; KeyError for an undeclared
    name while failpoints are switched on.
    """
    if _DIRECTORY is not None:
        _pass(Path(_DIRECTORY), name)


def _pass(directory: Path, name: str) -> None:
    DECLARED[name]
    _times_passed[name] = _times_passed.get(name, 0) + 1
    armed = directory / "armed" / name
    try:
        order = json.loads(armed.read_text(encoding="utf-8"))
        if _times_passed[name] < int(order.get("after", 1)):
            return
        # One process takes it: whoever is restarted after it does not die of it again.
        armed.rename(directory / "taken" / f"{name}.{os.getpid()}")
    except FileNotFoundError:
        return
    _ACTIONS[order["action"]](order)
