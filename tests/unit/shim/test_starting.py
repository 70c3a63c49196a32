"""What a shim has imported when it starts its engine: a run waits for all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.fakes.gpu_runs import write_engine

# A whole shim, to where it would start the engine; says what it was about to start and what is imported by then.
_PROGRAM = """
import json, os, subprocess, sys
from gpu_service.shim.__main__ import main

def start(command, **options):
    print(json.dumps([command, sorted(sys.modules)]), flush=True)
    os._exit(0)

subprocess.Popen = start
sys.exit(main(sys.argv[1:]))
"""


def test_an_engine_is_started_before_the_journal_is_imported(tmp_path: Path) -> None:
    directory = write_engine(tmp_path, argv=("/an/engine",))
    command = [sys.executable, "-c", _PROGRAM, str(directory)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    started, modules = json.loads(said.stdout)
    assert started[0] == "/an/engine"
    assert "gpu_service.shim.starting" in modules
    assert not set(modules) & {"gpu_service.journal", "google.protobuf", "gpu_service.shim.loop", "asyncio"}
