"""What an engine's process does before its first thread; a process of its own each, which imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

# Ends where the engine would start its first thread, and says what the environment is then.
_FIRST_THREAD = """
import json, os, socket, sys, threading
from gpu_service.engine import entrypoint

def start(thread):
    print(json.dumps({name: os.environ.get(name) for name in entrypoint._ENVIRONMENT}), flush=True)
    os._exit(0)

threading.Thread.start = start
entrypoint.SparePlanner.prepare = lambda planner: None
ours, theirs = socket.socketpair()
entrypoint.main(["--control-fd", str(theirs.detach())])
"""

# The modules that are at work while the libraries are loaded, each with whether its text writes the environment.
_WRITERS = r"""
import inspect, json, re, sys
from gpu_service.engine import device_facts, early_start, entrypoint, kernel_facts, planning
calls = r"\.(update|setdefault|pop|clear)\("
writes = re.compile(r"environ(\[[^]]*\]\s*[|+]?=[^=]|\s*\|=|" + calls + r")|del os\.environ|putenv|setenv")
ours = [(name, module) for name, module in sys.modules.items() if name.startswith("gpu_service.")]
print(json.dumps({name: bool(writes.search(inspect.getsource(module))) for name, module in ours if module.__file__
    and not name.endswith("__init__")}))
"""


def _run(program: str) -> Any:
    said = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    return json.loads(said.stdout)


def test_the_environment_is_whole_before_there_is_another_thread() -> None:
    environment = _run(_FIRST_THREAD)
    assert environment["CUDA_MODULE_LOADING"] == "LAZY"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert None not in environment.values()


def test_nothing_of_the_early_start_writes_the_environment() -> None:
    """The libraries read it without the interpreter's lock while they are loaded: a write then may crash them."""
    writers = _run(_WRITERS)
    assert {"gpu_service.engine.device_facts", "gpu_service.engine.kernel_facts"} <= writers.keys()
    assert [name for name, does in writers.items() if does] == ["gpu_service.engine.entrypoint"]
