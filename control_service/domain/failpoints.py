"""Named places in control's code where a test has the process die, stop, wait or meet an error. Off unless switched on.

`TUNESMITH_FAILPOINTS` names a directory. A file `armed/<name>` in it, a JSON object with `action` and what the action
needs, is taken by the first process that comes by, and carried out there. Without the variable nothing happens.
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
DECLARED: Mapping[str, str] = {
    "store.before-commit": "a group of changes is made, it is not committed",
    "store.after-commit": "a group is committed, nobody is told",
    "store.before-wake": "the event loop has a committed group, watchers and schedulers are not woken",
    "reply.before-send": "a call's work is done and committed, its answer is not sent",
    "dispatch.after-commit": "a job is DISPATCHING with its attempt, nobody called its node",
    "dispatch.before-start-run": "what the node lacked is pushed, StartRun is not called",
    "dispatch.after-start-run": "the node has the run, the job is still DISPATCHING",
    "ingest.before-commit": "events of a run are read from its node, they are not stored",
    "settle.before-commit": "a run is over, the job has not moved",
    "stop.before-stop-run": "a stop is stored, StopRun is not called",
    "stop.after-stop-run": "the node was told to stop a run, control does not know that it agreed",
    "fetch.before-commit": "bytes of a file came from a node, verified, the blob is not visible",
    "fetch.after-commit": "the blob is visible, no record names it",
    "blob.before-rename": "staged bytes are fsynced, they have no name",
    "blob.after-rename": "a blob has its name, its directory is not fsynced",
    "replicate.before-commit": "a checkpoint's bytes are here, no record says so",
    "collect.before-output": "an artifact's bytes are here, its output directory is not made",
    "output.between-renames": "an earlier output is renamed away, the new one is not in its place",
    "collect.before-succeeded": "all outputs are in place, the job has not SUCCEEDED",
    "release.before-release-run": "a run is not needed any more, its node is not told",
    "release.after-release-run": "a node has deleted a run, control has not noted that",
    "compact.between-transactions": "some events of a log are deleted, more are to be",
    "backup.before-rename": "a backup says that it is not finished, its new database is not in place",
    "backup.after-rename": "its new database is in place, the backup does not say that it is finished",
}


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
