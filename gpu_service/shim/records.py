"""`shim.json` (who is alive and what it holds) and `exit.json` (how an engine ended). Both survive a crash whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_service.shim import durable_json

SHIM_FILE_NAME = "shim.json"
EXIT_FILE_NAME = "exit.json"
# Exit status of a shim that found no room on the disk for its files.
EXIT_DISK_FULL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ShimRecord:
    """What someone who finds the shim gone must know to end its engine and close its run."""

    shim_pid: int
    shim_start_time: int
    engine_pid: int
    engine_start_time: int
    run_directory: str | None
    # `cancel` or `checkpoint` while such a stop is being carried out.
    stop_mode: str | None

    def write(self, directory: Path) -> None:
        """Always the same number of bytes; on a full disk they take the place of those that are there. OSError."""
        durable_json.write_over(directory / SHIM_FILE_NAME, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> ShimRecord | None:
        """None when no shim came so far. Raises OSError, ValueError, TypeError for a file that is not ours."""
        content = durable_json.read(directory / SHIM_FILE_NAME)
        return None if content is None else cls(**content)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitRecord:
    """How an engine ended. Status and signal are both None when nobody saw it end."""

    status: int | None
    signal: int | None
    # Phase of the run as last heard, e.g. `TRAINING`; empty without a run.
    phase: str
    run_directory: str | None
    stop_mode: str | None
    out_of_memory: bool = False
    # Resident memory of engine and descendants that its end gave back; 0 when it was not measured, as on a GPU.
    freed_bytes: int = 0
    # From the stop request to the last process' end; 0 without a stop.
    seconds: float = 0.0
    # No engine came up because the disk had no room for its files.
    disk_full: bool = False
    # How long it had made no progress when it was killed for that, and the limit; 0 for any other end.
    idle_seconds: float = 0.0
    hang_limit_seconds: float = 0.0
    # What its processes were doing when they hung or crashed.
    stacks: str = ""
    # Memory of the device that did not come back; 0 when it did, or cannot be asked.
    held_bytes: int = 0
    # What whoever wrote this knows beyond status and signal, for people.
    note: str = ""

    def write(self, directory: Path) -> None:
        durable_json.write(directory / EXIT_FILE_NAME, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> ExitRecord | None:
        """None when there is none. Raises OSError, ValueError, TypeError for a file that is not ours."""
        content = durable_json.read(directory / EXIT_FILE_NAME)
        return None if content is None else cls(**content)
