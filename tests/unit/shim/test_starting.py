"""What a shim imports before its engine is started: a run waits for all of it."""

from __future__ import annotations

import json
import subprocess
import sys

_PROGRAM = """
import json, sys
import gpu_service.shim.__main__
print(json.dumps(sorted(sys.modules)))
"""


def test_an_engine_is_started_before_the_journal_is_imported() -> None:
    said = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    modules = set(json.loads(said.stdout))
    assert "gpu_service.shim.starting" in modules
    assert not modules & {"gpu_service.journal", "google.protobuf", "gpu_service.shim.loop", "asyncio"}
