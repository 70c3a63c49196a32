"""What may be on the disk when the power goes after some changes: synced ones are, each other one may be or not.

A model stricter than any one file system: bytes that were not synced may be lost, cut or zero, names of a directory
that was not synced may be missing or still there, in any combination; a rename is one change, done once its target's
directory is synced.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.power_loss.changes import ROOT, Change, Enter, Make, Move, Remove, Sync, Truncate, Write

# What becomes of a change that was not synced; None: nothing of it is left.
Fate = Callable[[Change], Change | None]


def nothing_survives(_change: Change) -> Change | None:
    """Only what was synced is there."""
    return None


def everything_survives(change: Change) -> Change | None:
    """The cache had just been written back: as after the death of the process alone."""
    return change


def names_survive(change: Change) -> Change | None:
    """Names are written back before bytes: the files that are empty after a crash."""
    return None if isinstance(change, (Write, Truncate)) else change


def bytes_survive(change: Change) -> Change | None:
    """Bytes are written back before names."""
    return change if isinstance(change, (Write, Truncate)) else None


def at_random(seed: int) -> Fate:
    """Each change by itself: there, gone, or, for bytes, cut or zero."""
    seeded = random.Random(seed)

    def fate(change: Change) -> Change | None:
        drawn = seeded.random()
        if drawn < 0.4:
            return change
        if isinstance(change, Write) and drawn < 0.6:
            return Write(change.inode, change.offset, change.data[: seeded.randrange(len(change.data))])
        if isinstance(change, Write) and drawn < 0.7:
            return Write(change.inode, change.offset, bytes(len(change.data)))
        return None

    return fate


@dataclass(kw_only=True)
class Disk:
    """Names by directory and bytes by file, as inodes."""

    names: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    contents: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> Disk:
        """Another that may be changed."""
        return Disk(names={inode: dict(names) for inode, names in self.names.items()}, contents=dict(self.contents))

    def apply(self, change: Change) -> None:
        """One change."""
        if isinstance(change, Make):
            if change.is_directory:
                self.names[change.inode] = {}
            else:
                self.contents[change.inode] = b""
        elif isinstance(change, Enter):
            self.names[change.directory][change.name] = change.inode
        elif isinstance(change, Remove):
            self._forget(change.directory, change.name, change.inode)
        elif isinstance(change, Move):
            self._forget(change.source, change.source_name, change.inode)
            self.names[change.target][change.target_name] = change.inode
        elif isinstance(change, Truncate):
            self.contents[change.inode] = self.contents[change.inode][: change.size_bytes]
        elif isinstance(change, Write):
            before = self.contents[change.inode].ljust(change.offset, b"\0")
            self.contents[change.inode] = before[: change.offset] + change.data

    def _forget(self, directory: int, name: str, inode: int) -> None:
        if self.names[directory].get(name) == inode:
            del self.names[directory][name]

    def state(self) -> tuple[object, ...]:
        """Equal for disks that hold the same below the root."""

        def tree(inode: int) -> object:
            if inode in self.contents:
                return self.contents[inode]
            return tuple((name, below, tree(below)) for name, below in sorted(self.names[inode].items()))

        return (tree(ROOT),)

    def put(self, root: Path) -> None:
        """Makes `root` hold this and nothing else; names of one inode are hard links."""
        shutil.rmtree(root, ignore_errors=True)
        placed: dict[int, Path] = {}

        def put(inode: int, path: Path) -> None:
            if inode in self.names:
                path.mkdir()
                for name, below in self.names[inode].items():
                    put(below, path / name)
            elif inode in placed:
                os.link(placed[inode], path)
            else:
                path.write_bytes(self.contents[inode])
                placed[inode] = path

        put(ROOT, root)


def after_power_loss(start: Disk, changes: Sequence[Change], fate: Fate) -> Disk:
    """What is on the disk after these changes, those that were not synced as `fate` says."""
    synced_at = _last_syncs(changes)
    disk = start.copy()
    for index, change in enumerate(changes):
        holder = _held_by(change)
        if holder is None or synced_at.get(holder, -1) > index:
            disk.apply(change)
        else:
            left = fate(change)
            if left is not None:
                disk.apply(left)
    return disk


def _last_syncs(changes: Sequence[Change]) -> Mapping[int, int]:
    return {change.inode: index for index, change in enumerate(changes) if isinstance(change, Sync)}


def _held_by(change: Change) -> int | None:
    """The inode whose sync makes the change durable; None for what is no change of the disk."""
    if isinstance(change, (Enter, Remove)):
        return change.directory
    if isinstance(change, Move):
        return change.target
    return change.inode if isinstance(change, (Write, Truncate)) else None
