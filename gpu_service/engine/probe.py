"""The memory probe's process: `python -m gpu_service.engine.probe <directory>`. Loads a planned run, makes two steps.

The directory has a `run.json` with `plan_directory`; what is written there is the caller's to delete. Prints one line:
`{"type":"measured","peak_bytes":1,"step_tokens":2,"longest_tokens":3}` or
`{"type":"failed","reason":"DEVICE_OUT_OF_MEMORY","message":"...","stage":"TRAINING"}`. Ends at once when its standard
input closes: whoever asked is gone. Saves nothing.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu_service.engine import request
from gpu_service.engine.failures import RunFailure, unforeseen
from gpu_service.journal import Writer
from tunesmith.common.v1 import errors_pb2

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
_EXIT_ORPHANED = 75
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Measure the run of the directory. Status 0 with an answer of either kind, 2 when it was called wrongly."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m gpu_service.engine.probe <directory>\n")
        return 2
    _die_with_the_caller()
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    # One line for each quantized layer of each forward pass is no news.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.update(_ENVIRONMENT)
    # Libraries may print; the answer is the only line of the real standard output.
    answers, sys.stdout = sys.stdout, sys.stderr
    answers.write(json.dumps(measure(Path(arguments[0]))) + "\n")
    answers.flush()
    return 0


def measure(directory: Path) -> dict[str, Any]:
    """The answer for a directory, whatever happens."""
    # Imports torch.
    run_module = import_module("gpu_service.engine.run")
    devices = import_module("gpu_service.engine.devices")
    shelf = import_module("gpu_service.engine.resident").BaseShelf()
    reporter_class = import_module("gpu_service.engine.reporter").Reporter
    switch = import_module("gpu_service.engine.stopping").StopSwitch()
    asked = request.read(directory)
    plan_directory = Path(json.loads((directory / "run.json").read_text(encoding="utf-8"))["plan_directory"])
    with Writer.open(asked.journal_path, asked.attempt) as writer:
        reporter = reporter_class(run_directory=directory, writer=writer, notify=lambda notice: None)
        run = run_module.Run(
            request=asked,
            device=devices.select(asked.device),
            shelf=shelf,
            switch=switch,
            reporter=reporter,
            planner_command=(),
        )
        try:
            run.device.make_current()
            rehearsed = run.open_session(plan_directory).rehearse()
        except RunFailure as error:
            return _failed(error.failure)
        except Exception as error:
            # The process' outermost boundary: any defect becomes a typed answer.
            logging.exception("the probe failed in an unforeseen way")
            stage = reporter.loading_stage
            return _failed(unforeseen(error, phase=reporter.phase or "TRAINING", loading_stage=stage, file=""))
    return {
        "type": "measured",
        "peak_bytes": rehearsed.peak_bytes,
        "step_tokens": rehearsed.step_tokens,
        "longest_tokens": rehearsed.longest_tokens,
    }


def _failed(failure: errors_pb2.Failure) -> dict[str, Any]:
    reason = errors_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
    return {"type": "failed", "reason": reason, "message": failure.message, "stage": failure.stage}


def _die_with_the_caller() -> None:
    # The kernel's part, for a process that hangs where none of its threads gets to read the pipe.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _end_with_the_caller() -> None:
    # Also when the caller died before it was asked for: then the pipe is closed already.
    while sys.stdin.buffer.read(4096):
        pass
    # Nothing of this process is worth a clean end.
    os._exit(_EXIT_ORPHANED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
