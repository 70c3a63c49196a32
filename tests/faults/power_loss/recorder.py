"""Records what this process does to the files below a directory, in order.

The functions of `os` that change or sync something are replaced while it records; before and after each the directory
is looked through, so that what native code wrote meanwhile (safetensors, buffered files) is recorded as well, unsynced
until somebody syncs it. What happens between two such calls is one change for each file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.faults.power_loss.changes import (
    ROOT,
    Acknowledge,
    Change,
    Enter,
    Make,
    Move,
    Remove,
    Sync,
    Truncate,
    Write,
)

# Whatever else changes files is seen by looking.
_LOOKED_AT = ("unlink", "remove", "rmdir", "mkdir", "link", "truncate", "ftruncate", "write", "pwrite", "writev")
_MOVES = ("rename", "replace")
_SYNCS = ("fsync", "fdatasync")
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killed(BaseException):
    """The process was killed here, as the recorder was told; from here on it changes nothing."""


class Recorder:
    """A context manager; `changes` are everything below `root` since it was entered."""

    def __init__(self, root: Path, *, kill_at: int | None = None) -> None:
        """`kill_at`: the call of `os`, from 1, at which everything that this process goes on to do raises `Killed`."""
        self._root = str(root.resolve())
        self._kill_at = kill_at
        self.num_calls = 0
        self.changes: list[Change] = []
        self._lock = threading.RLock()
        self._real: dict[str, Callable[..., Any]] = {}
        self._next_inode = ROOT + 1
        # By (device, inode number) of the machine's file system.
        self._inodes: dict[tuple[int, int], int] = {}
        self.names: dict[int, dict[str, int]] = {ROOT: {}}
        self.contents: dict[int, bytes] = {}

    def __enter__(self) -> Self:
        status = Path(self._root).stat()
        self._inodes[status.st_dev, status.st_ino] = ROOT
        self._look()
        # What is there at the start has been there for long.
        self.changes.clear()
        for name in (*_LOOKED_AT, *_MOVES, *_SYNCS, "open"):
            self._real[name] = getattr(os, name)
            setattr(os, name, self._wrapped(name))
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            for name, function in self._real.items():
                setattr(os, name, function)
            self._look()

    def acknowledge(self, what: str) -> None:
        """The writer says that this is safe now."""
        with self._lock:
            self._look()
            self.changes.append(Acknowledge(what))

    def revive(self) -> None:
        """Another process goes on from here."""
        self._kill_at = None

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & _OPENS_TO_WRITE:
                return real(*arguments, **options)
            with self._lock:
                self.num_calls += 1
                if self._kill_at is not None and self.num_calls >= self._kill_at:
                    raise Killed
                self._look()
                move = self._move(*arguments, **options) if name in _MOVES else None
                answer = real(*arguments, **options)
                if name in _SYNCS:
                    self._note_sync(arguments[0])
                elif move is not None:
                    self._apply_move(move)
                self._look()
                return answer

        return call

    def _note_sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        inode = self._inodes.get((status.st_dev, status.st_ino))
        if inode is not None:
            self.changes.append(Sync(inode))

    def _move(
        self, source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> Move | None:
        """What a rename amounts to; None when it leaves or enters the directory."""
        source_parent, source_name = self._place(source, src_dir_fd)
        target_parent, target_name = self._place(target, dst_dir_fd)
        if source_parent is None or target_parent is None:
            return None
        inode = self.names[source_parent].get(source_name)
        return None if inode is None else Move(source_parent, source_name, target_parent, target_name, inode)

    def _place(self, path: Any, directory: int | None) -> tuple[int | None, str]:
        text = os.fspath(path)
        if directory is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)  # noqa: PTH115, PTH118 - as os gets it
        parent, name = os.path.split(os.path.abspath(text))  # noqa: PTH100
        try:
            status = Path(parent).stat()
        except FileNotFoundError:
            return None, name
        return self._inodes.get((status.st_dev, status.st_ino)), name

    def _apply_move(self, move: Move) -> None:
        del self.names[move.source][move.source_name]
        self.names[move.target][move.target_name] = move.inode
        self.changes.append(move)

    # Looking.

    def _look(self) -> None:
        seen = {ROOT}
        self._look_into(self._root, ROOT, seen)
        for gone in {inode for inode in self._inodes.values() if inode not in seen}:
            # The number may be given to another file.
            self._inodes = {key: inode for key, inode in self._inodes.items() if inode != gone}
            self.names.pop(gone, None)
            self.contents.pop(gone, None)

    def _look_into(self, path: str, directory: int, seen: set[int]) -> None:
        try:
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        known = self.names[directory]
        for name in sorted(known.keys() - {entry.name for entry in entries}):
            self.changes.append(Remove(directory, name, known.pop(name)))
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            key, is_directory = (status.st_dev, status.st_ino), entry.is_dir(follow_symlinks=False)
            inode = self._inodes.get(key)
            if inode is None:
                inode = self._inodes[key] = self._next_inode
                self._next_inode += 1
                self.changes.append(Make(inode, is_directory))
                if is_directory:
                    self.names[inode] = {}
                else:
                    self.contents[inode] = b""
            if known.get(entry.name) != inode:
                known[entry.name] = inode
                self.changes.append(Enter(directory, entry.name, inode))
            seen.add(inode)
            if is_directory:
                self._look_into(entry.path, inode, seen)
            else:
                self._look_at(Path(entry.path), inode)

    def _look_at(self, path: Path, inode: int) -> None:
        # Always read: clocks of file systems are too coarse to tell by the time whether one was written again.
        data = path.read_bytes()
        before = self.contents[inode]
        if data == before:
            return
        same = _num_same(before, data)
        if same < len(before):
            self.changes.append(Truncate(inode, same))
        if same < len(data):
            self.changes.append(Write(inode, same, data[same:]))
        self.contents[inode] = data


def _num_same(left: bytes, right: bytes) -> int:
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(index for index in range(shorter) if left[index] != right[index])
