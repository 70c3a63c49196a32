"""The directory of armed failpoints of a trial: arms, disarms, and says which process took what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from control_service.domain import failpoints as control_failpoints
from gpu_service.journal import failpoints as gpu_failpoints

# Names of both services; they share a directory.
DECLARED = {**control_failpoints.DECLARED, **gpu_failpoints.DECLARED}
ENVIRONMENT_VARIABLE = "TUNESMITH_FAILPOINTS"


class Failpoints:
    """Files that the services' processes look for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("armed", "taken"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    def arm(self, name: str, *, action: str = "kill", after: int = 1, **fields: Any) -> None:
        """The next process that comes by for the `after`-th time does it. KeyError for a name that nothing has."""
        DECLARED[name]
        staged = self.directory / f".{name}"
        staged.write_text(json.dumps({"action": action, "after": after, **fields}), encoding="utf-8")
        staged.rename(self.directory / "armed" / name)

    def disarm_all(self) -> list[str]:
        """Takes back what nobody took, and names it."""
        left = sorted((self.directory / "armed").iterdir())
        for path in left:
            path.unlink(missing_ok=True)
        return [path.name for path in left]

    def armed(self) -> set[str]:
        """What waits for a process."""
        return {path.name for path in (self.directory / "armed").iterdir()}

    def taken(self) -> set[tuple[str, int]]:
        """Names, each with the pid of a process that took it."""
        found = (path.name.rpartition(".") for path in (self.directory / "taken").iterdir())
        return {(name, int(pid)) for name, _, pid in found}

    def taken_paths(self, name: str) -> set[str]:
        """One name a process that took it."""
        return {path.name for path in (self.directory / "taken").glob(f"{name}.*")}

    def taken_time(self, name: str, pid: int) -> float:
        """When it was taken, by the wall clock."""
        return (self.directory / "taken" / f"{name}.{pid}").stat().st_ctime

    def action_of(self, name: str, pid: int) -> str:
        """What the process that took it was told to do."""
        return str(json.loads((self.directory / "taken" / f"{name}.{pid}").read_text(encoding="utf-8"))["action"])

    def taken_by(self, pid: int) -> str:
        """What a process died of; empty when it was something else."""
        return next((name for name, taker in self.taken() if taker == pid), "")
