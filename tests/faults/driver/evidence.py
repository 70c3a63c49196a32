"""The evidence directory of a trial: JSON lines that are appended from any thread. Interprets none of them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Evidence:
    """What happened in a trial, in files: `operations`, `faults`, `processes`, and `watches/<consumer>`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        (directory / "watches").mkdir(parents=True, exist_ok=True)
        # A trial without consumers or observations has said so, too.
        for name in ("operations", "faults", "processes"):
            (directory / f"{name}.jsonl").touch()

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Adds a line to `<name>.jsonl`."""
        with self._lock, (self.directory / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self, name: str) -> list[dict[str, Any]]:
        """Every line of `<name>.jsonl` so far."""
        with self._lock:
            text = (self.directory / f"{name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def fault(
        self,
        *,
        kind: str,
        target: str,
        pid: int = 0,
        failpoint: str = "",
        service: str = "",
        seconds_ago: float = 0.0,
    ) -> None:
        """Something was broken, or mended; `service` is the name of one that was meant, as control or a node."""
        line = {
            "at": time.monotonic() - seconds_ago,
            "kind": kind,
            "target": target,
            "failpoint": failpoint,
            "service": service,
            "pid": pid,
        }
        self.append("faults", line)

    def describe(
        self,
        *,
        seed: int,
        control_directory: Path,
        output_root: Path,
        node_directories: Mapping[str, Path],
        node_lease_seconds: float,
        all_over: bool = False,
    ) -> None:
        """Writes `scenario.json`: where the services' own files lie, and whether every job was waited for.

        `node_lease_seconds`: how long a node may be silent before control gives its jobs away.
        """
        facts = {
            "seed": seed,
            "all_over": all_over,
            "node_lease_seconds": node_lease_seconds,
            "control_directory": str(control_directory),
            "output_root": str(output_root),
            "node_directories": {name: str(path) for name, path in node_directories.items()},
        }
        (self.directory / "scenario.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
