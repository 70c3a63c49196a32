"""Whether a device's memory came back after its engine's end: asks a program, again and again for a while.

The driver is asked by a process of its own, because one that fails may hang whoever asks. Refuses to guess: where
nobody answers, nothing is said to be held.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence

from gpu_service.shim.configuration import EngineConfiguration

# What may be left, as the contract says it.
SLACK_BYTES = 64 * 1024 * 1024
_ANSWER_SECONDS = 10.0
_MAX_PATIENCE_SECONDS = 15.0
_ASK_AGAIN_SECONDS = 0.5


def held_bytes(configuration: EngineConfiguration) -> int:
    """What is held above what was before the engine, after its grace; 0 when that is within the slack, or unknown."""
    command, before_bytes = configuration.device_memory_command, configuration.device_memory_bytes
    if not command:
        return 0
    deadline = time.monotonic() + min(configuration.grace_seconds, _MAX_PATIENCE_SECONDS)
    while True:
        now_bytes = ask(command)
        if now_bytes is None:
            return 0
        held = now_bytes - before_bytes
        if held <= SLACK_BYTES:
            return 0
        if time.monotonic() >= deadline:
            return held
        time.sleep(_ASK_AGAIN_SECONDS)


def ask(command: Sequence[str]) -> int | None:
    """The number that the program prints; None when it prints none in time."""
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ANSWER_SECONDS, check=True, text=True
        )
        return int(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
