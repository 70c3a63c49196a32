"""Makes this process an engine's parent and starts the engine, before what only the engine's end needs is imported.

A run waits for every millisecond of it. Refuses to hear anybody: that is the loop's work, which takes over.
"""

from __future__ import annotations

import os
import selectors
from dataclasses import dataclass
from pathlib import Path

from gpu_service.oom_counter import oom_kills
from gpu_service.shim import process_tree
from gpu_service.shim.configuration import EngineConfiguration
from gpu_service.shim.engine_process import EngineProcess
from gpu_service.shim.signals import Signals


@dataclass(frozen=True, kw_only=True)
class Started:
    """An engine that runs, and what wakes its parent. `oom_kills` is the kernel's count from before it."""

    directory: Path
    configuration: EngineConfiguration
    selector: selectors.BaseSelector
    signals: Signals
    engine: EngineProcess
    oom_kills: int


def start(directory: Path) -> Started:
    """Start the engine of a directory, which becomes this process' own. Raises EngineDirectoryInvalid, OSError."""
    configuration = EngineConfiguration.read(directory)
    working_directory = Path.cwd()
    os.chdir(directory)
    process_tree.become_subreaper()
    selector = selectors.DefaultSelector()
    signals = Signals(selector)
    kills = oom_kills()
    engine = EngineProcess(configuration, directory=directory, working_directory=working_directory)
    return Started(
        directory=directory,
        configuration=configuration,
        selector=selector,
        signals=signals,
        engine=engine,
        oom_kills=kills,
    )
