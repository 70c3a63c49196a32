"""The planner's process names what ran out, and calls the rest by its own name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gpu_service.planner import __main__ as process


@pytest.mark.parametrize(
    ("error", "reason", "fault"),
    [
        (MemoryError(), "HOST_OUT_OF_MEMORY", "HARDWARE"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "HOST_OUT_OF_MEMORY", "HARDWARE"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "DISK_FULL", "PLATFORM"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "PLANNING", "PLATFORM"),
        (RuntimeError("no"), "PLANNING", "PLATFORM"),
    ],
)
def test_what_ran_out_is_named(
    error: Exception,
    reason: str,
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> dict[str, Any]:
        raise error

    monkeypatch.setattr(process, "_prepare", lambda value, versions: fail)
    request = tmp_path / "request.json"
    request.write_text("{}")

    assert process.main([str(request)]) == process.EXIT_REFUSED

    failure = json.loads(capsys.readouterr().out)["failure"]
    assert (failure["reason"], failure["fault"], failure["stage"]) == (reason, fault, "PLANNING")
    assert failure["message"]
