"""Records what code fsyncs, renames and makes, and says what of it a power loss could take back.

Sees `os.fsync`, `os.mkdir`, `os.rename` and `os.replace` of this process, which is what all of our writers use. Judges
by what was on the disk when; it replays nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_Version = tuple[int, int, int, int]


@dataclass(kw_only=True)
class DiskSteps:
    """`steps` are ("fsync", path), ("mkdir", path) and ("rename", path under the new name), in order."""

    steps: list[tuple[str, Path]] = field(default_factory=list)
    # Files and directories that a rename made visible while they were not on the disk as they were then.
    unsynced: list[Path] = field(default_factory=list)
    _synced: set[_Version] = field(default_factory=set)

    def note_fsync(self, descriptor: int) -> None:
        """Called once the kernel has done it."""
        self._synced.add(_version(os.fstat(descriptor)))
        self.steps.append(("fsync", _path_of(descriptor)))

    def note_rename(self, target: Path) -> None:
        """Called once the kernel has done it."""
        self.steps.append(("rename", target))
        below = [target, *sorted(target.rglob("*"))] if target.is_dir() else [target]
        self.unsynced += [path for path in below if not path.is_symlink() and not self.has(path)]

    def has(self, path: Path) -> bool:
        """Whether the file or directory was fsynced as it is now."""
        return _version(path.stat()) in self._synced

    @property
    def unsettled(self) -> list[Path]:
        """What got its name in a directory that was not fsynced after it: the name may be lost."""
        return [
            path
            for at, (kind, path) in enumerate(self.steps)
            if kind != "fsync" and path.exists() and ("fsync", path.parent) not in self.steps[at:]
        ]

    @property
    def is_durable(self) -> bool:
        """Nothing that was recorded can be taken back, nor be there without its content."""
        return not self.unsynced and not self.unsettled


def record_disk_steps(monkeypatch: pytest.MonkeyPatch) -> DiskSteps:
    """Records until the test ends."""
    steps, fsync, mkdir = DiskSteps(), os.fsync, os.mkdir

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        steps.note_fsync(descriptor)

    def note_mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        steps.steps.append(("mkdir", _below(dir_fd, path)))

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "mkdir", note_mkdir)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, _noting(getattr(os, name), steps))
    return steps


def _noting(rename: Any, steps: DiskSteps) -> Any:
    def note_rename(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        steps.note_rename(_below(dst_dir_fd, target))

    return note_rename


def _below(descriptor: int | None, path: Any) -> Path:
    return Path(path) if descriptor is None else _path_of(descriptor) / path


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _version(status: os.stat_result) -> _Version:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
