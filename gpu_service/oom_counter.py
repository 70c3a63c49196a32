"""Reads the kernel's count of out-of-memory kills, so that one can be told from any other SIGKILL."""

from __future__ import annotations

from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def oom_kills() -> int:
    """Kills so far in this process' memory cgroup, or on the machine where the cgroup does not count them."""
    for path in (*_cgroup_files(), Path("/proc/vmstat")):
        count = _field(path, "oom_kill")
        if count is not None:
            return count
    return 0


def _cgroup_files() -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files.append(_CGROUP_ROOT / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(_CGROUP_ROOT / "memory" / path.lstrip("/") / "memory.oom_control")
    return files


def _field(path: Path, name: str) -> int | None:
    try:
        content = path.read_text()
    except OSError:
        return None
    for line in content.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return None
