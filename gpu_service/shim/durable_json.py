"""Reads and writes small JSON files that must survive a crash whole: staged, fsynced, renamed, directory fsynced."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A page: what most file systems allot at least.
_FIXED_BYTES = 4096


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file. Either the old or the new content is there at any time. Raises OSError."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staged.open("w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(path)
    except OSError:
        # Half of it on a full disk would keep it full.
        staged.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_over(path: Path, content: Mapping[str, Any]) -> None:
    """As `write`, for a small file that must change on a full disk too: it has a fixed size, so that its bytes can be
    written in place there. Raises OSError, ValueError for what is too large.
    """
    raw = json.dumps(content, indent=1).encode()
    if len(raw) > _FIXED_BYTES:
        raise ValueError(f"{path.name} has {len(raw)} bytes; {_FIXED_BYTES} are kept for it")
    padded = raw.ljust(_FIXED_BYTES - 1) + b"\n"
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staged.open("wb") as stream:
            stream.write(padded)
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        staged.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, padded, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path) -> dict[str, Any] | None:
    """The object in the file; None when there is no file. Raises OSError, ValueError when it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, so that it survives a crash; one that is there is made durable. Raises
    OSError.
    """
    made = [path, *(parent for parent in path.parents if not parent.exists())]
    path.mkdir(parents=True, exist_ok=True)
    # Also where somebody else made it: who did may have died before its name was on the disk.
    for directory in made:
        sync_directory(directory.parent)


def sync_tree(path: Path) -> None:
    """Make every file and every name below a directory durable, and the directory itself. Raises OSError."""
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync(Path(directory) / name, os.O_RDONLY)
        sync_directory(Path(directory))


def sync_directory(path: Path) -> None:
    """Make renames and creations in a directory durable. Raises OSError."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
