"""Named places in the node's code where a test has a process die, stop, wait or meet an error. Off unless switched on.

`TUNESMITH_FAILPOINTS` names a directory. A file `armed/<name>` in it, a JSON object with `action` and what the action
needs, is taken by the first process that comes by, and carried out there. Without the variable nothing happens.
Server, shim and engine all have it, which is why it lies in the one package that all of them may import.
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
    # The server.
    "node-blob.before-rename": "a blob's bytes are fsynced, they have no name",
    "node-blob.after-rename": "a blob has its name, its directory is not fsynced",
    "accept.between-files": "a run has its run.json, node.json does not know the attempt",
    "accept.after-files": "both files know the attempt, nobody else does",
    "spawn.before-shim": "an engine has its directory, no shim is started",
    "spawn.after-shim": "a shim is started, the server is not connected to it",
    "launch.before-start-run": "a run is given to an engine, its shim is not told",
    "launch.after-start-run": "the shim is told of the run, the server has not gone on",
    "watch-run.after-send": "events are sent to control, nobody knows whether they arrived",
    "discard.before-rename": "a run is to be released, it is still in its place",
    "discard.after-rename": "a released run is out of its place, it is not deleted",
    # The shim, or who buries it.
    "shim.before-record": "an engine is started, shim.json does not name it",
    "shim.before-forward": "shim.json names the run, the engine has not heard of it",
    "shim.before-exit-record": "an engine and its descendants are gone, exit.json does not say so",
    "shim.after-exit-record": "exit.json is written, the run's journal is not closed",
    "shim.after-close": "the run's journal is closed, the server is not told",
    "bury.before-exit-record": "nothing of an engine lives, exit.json does not say so",
    "bury.after-exit-record": "exit.json is written for a dead shim, the run's journal is not closed",
    # Whoever writes a journal.
    "journal.before-append": "an event is made, nothing of it is written",
    "journal.before-fsync": "a durable event is written, it is not fsynced",
    "journal.after-append": "an event is in the journal, nobody is told",
    # The engine.
    "staged.before-rename": "a checkpoint's or the artifacts' files are fsynced, they are not in their place",
    "staged.after-rename": "they are in their place, its directory is not fsynced",
    "checkpoint.before-manifest": "a checkpoint's files are written, its manifest is not",
    "checkpoint.before-event": "a checkpoint is in its place, no event tells of it",
    "deleted.after-rename": "what is to be deleted is renamed away, its bytes are still there",
    "artifacts.before-manifest": "the artifacts are written, their manifest is not",
    "artifacts.before-event": "the artifacts are in their place, no event tells of them",
    "ending.before-terminal": "memory is given back, the run's outcome is not recorded",
    "ending.after-terminal": "the outcome is recorded, the shim is not told",
    # The planner.
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
