"""The engine's process: command line, signals, and the order of its start. Imports torch late, `ready` comes after.

A stop is heard while imports go on, and a run that comes is planned meanwhile (`early_start`). The libraries come with
the first work that needs them, or before there is any (`libraries`). Never reads the network: the hub's client is told
to stay offline.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import ModuleType

from gpu_service.engine.control import ControlPipe
from gpu_service.engine.early_start import EarlyStart
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.shared_libraries import load_ahead
from gpu_service.engine.spare_planner import SparePlanner

_LOG = logging.getLogger(__name__)

# Read by the libraries when they are imported, and by the driver when it starts: kernels are loaded when they are first
# launched, as torch has it. Set before there is another thread: the libraries read it while they are loaded, in no
# order with whoever would write it then.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "CUDA_MODULE_LOADING": "LAZY",
}

# Set by whoever starts an engine for a device: `cuda:0`, and the directory of a model that is likely to be wanted.
_DEVICE_VARIABLE, _MODEL_VARIABLE = "TUNESMITH_ENGINE_DEVICE", "TUNESMITH_ENGINE_MODEL"


def main(arguments: Sequence[str]) -> int:
    """Serve the control socket given by `--control-fd` until it closes, `shutdown`, SIGTERM or SIGINT. Exit status."""
    parser = argparse.ArgumentParser(prog="python -m gpu_service.engine", description="Train runs on one device.")
    parser.add_argument("--control-fd", type=int, required=True, help="inherited stream socket to the shim")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # One line for each quantized layer of each forward pass is no news.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _LOG.info("begun")
    faulthandler.enable()
    # The shim asks for the stacks of all threads before it ends an engine that hangs. Not by SIGUSR1, whose handler is
    # LLVM's once Triton has compiled a kernel.
    faulthandler.register(signal.SIGRTMIN, all_threads=True)
    os.environ.update(_ENVIRONMENT)
    with socket.socket(fileno=options.control_fd) as connection:
        # Children must not hold the pipe open after the engine.
        os.set_inheritable(connection.fileno(), False)
        device_id, model = (os.environ.get(name, "") for name in (_DEVICE_VARIABLE, _MODEL_VARIABLE))
        planner = SparePlanner()
        early = EarlyStart(device_id=device_id, planner=planner)
        pipe = ControlPipe(connection, on_run=early.offer)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: pipe.shut_down())
        # It imports beside this process.
        planner.prepare()
        pipe.start()
        early.begin()
        # Wherever it leaves, nothing works on for a run that it did not take up.
        with closing(early):
            service = _import_libraries(pipe, early, device_id)
            status: int = service.serve(pipe, planner, device_id, Path(model) if model else None, early)
            return status


def _import_libraries(pipe: ControlPipe, early: EarlyStart, device_id: str) -> ModuleType:
    """Import torch and the engine, with what goes on beside; the engine's service."""
    # Of the millions of objects that imports make nearly all stay; looking for those that do not takes a fifth of
    # the time.
    gc.disable()
    linking = load_ahead()
    beside = threading.Thread(target=_import_beside, args=(device_id,), name="import-beside", daemon=True)
    beside.start()
    # An import that finds the linker at work waits for it, and holds the interpreter meanwhile.
    linking.join()
    # Each may take a minute from a slow disk, and is a sign of progress.
    pipe.note_progress()
    import_module("torch")
    _LOG.info("torch is imported")
    pipe.note_progress()
    # No two threads import Triton's parts in different orders.
    beside.join()
    early.torch_is_there()
    service: ModuleType = import_module("gpu_service.engine.service")
    _LOG.info("the engine is imported")
    pipe.note_progress()
    early.end_imports()
    # Else the first collection, a moment from now, looks at all of them.
    gc.freeze()
    gc.enable()
    return service


def _import_beside(device_id: str) -> None:
    """What needs no torch, while torch is imported: one waits for files where the other computes."""
    kind, _, index = device_id.partition(":")
    if kind != "cuda":
        return
    try:
        import_module("triton")
    except ImportError as error:
        # Builds of torch for CPUs bring none; whoever needs it says so.
        _LOG.info("no Triton: %s", error)
        return
    import_module("gpu_service.engine.kernel_facts").find_out(DeviceChoice(type=kind, index=int(index)))
