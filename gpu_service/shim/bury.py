"""Ends what is left of an engine whose shim is gone, and closes its run.

Called with the shim's lock held, which proves the shim dead. Refuses to overwrite an exit record: a shim that died
between record and journal has said the truth already.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gpu_service.journal.failpoints import failpoint
from gpu_service.shim import device_memory, process_tree
from gpu_service.shim.closing import close_run
from gpu_service.shim.configuration import EngineConfiguration, EngineDirectoryInvalid
from gpu_service.shim.engine_process import ENGINE_MARK
from gpu_service.shim.records import ExitRecord, ShimRecord

_LOOK_AGAIN_SECONDS = 0.05


def bury(directory: Path, *, stop_mode: str | None = None) -> None:
    """Kill every process of the engine, write `exit.json`, close the run's journal. Raises OSError, ValueError.

    `stop_mode` is that of a stop that the shim may not have heard of.
    """
    started = time.monotonic()
    mark = str(directory)
    freed_bytes = 0
    if _trained_in_host_memory(directory):
        freed_bytes = process_tree.resident_bytes(process_tree.with_environment(ENGINE_MARK, mark))
    while process_tree.kill_with_environment(ENGINE_MARK, mark):
        time.sleep(_LOOK_AGAIN_SECONDS)
    shim = ShimRecord.read(directory)
    ending = ExitRecord.read(directory)
    if ending is None:
        ending = ExitRecord(
            status=None,
            signal=None,
            phase="",
            run_directory=shim.run_directory if shim else None,
            stop_mode=(shim.stop_mode if shim else None) or stop_mode,
            held_bytes=_held_bytes(directory),
            freed_bytes=freed_bytes,
            seconds=time.monotonic() - started,
        )
        failpoint("bury.before-exit-record")
        try:
            ending.write(directory)
        except OSError as error:
            # The run's journal has room of its own, and is what counts; without a record the engine is buried again.
            sys.stderr.write(f"no exit record: {error}\n")
        failpoint("bury.after-exit-record")
    if ending.run_directory is None:
        return
    run_directory = Path(ending.run_directory)
    # A run that was released since has nothing left to close.
    if run_directory.is_dir():
        close_run(run_directory, ending)


def _trained_in_host_memory(directory: Path) -> bool:
    configuration = _read(directory)
    return configuration is not None and configuration.trains_in_host_memory


def _held_bytes(directory: Path) -> int:
    configuration = _read(directory)
    if configuration is None:
        return 0
    return device_memory.held_bytes(configuration)


def _read(directory: Path) -> EngineConfiguration | None:
    try:
        return EngineConfiguration.read(directory)
    except EngineDirectoryInvalid:
        # It is buried all the same; what its end gave back is not known.
        return None
