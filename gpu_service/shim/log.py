"""The shim's own lines in the engine's log: one JSON object each, with the run's ids."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def write_line(event: str, run_directory: str | None, **fields: Any) -> None:
    """`event` gets the shim's prefix."""
    ids: dict[str, Any] = {"shim_pid": os.getpid()}
    if run_directory is not None:
        # runs/<job id>/<attempt>
        ids |= {"job_id": Path(run_directory).parent.name, "run_directory": run_directory}
    # The log lies on the same disk as everything else; an engine's parent does not end over a line of it.
    with contextlib.suppress(OSError):
        sys.stderr.write(json.dumps({"event": f"shim-{event}", **ids, **fields}) + "\n")
        sys.stderr.flush()
