"""Walks below a root by directory descriptors, never through a symbolic link. Every path is relative to its root."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from control_service.domain.errors import InvalidArgument

MAX_PATH_CHARACTERS: Final = 1024
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def parts_of(path: str) -> tuple[str, ...]:
    """The names of a relative path with forward slashes; `./` and doubled slashes say nothing. PATH_NOT_ALLOWED: an
    absolute path, `..`, a backslash, NUL or another control character, or too long."""
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    has_controls = any(ord(character) < 32 or ord(character) == 127 for character in path)
    leaves_root = path.startswith("/") or ".." in parts or "\\" in path
    if not parts or leaves_root or has_controls or len(path) > MAX_PATH_CHARACTERS:
        raise InvalidArgument("PATH_NOT_ALLOWED", "a path must be relative and stay below its root")
    return parts


@contextmanager
def open_root(root: Path) -> Iterator[int]:
    """A descriptor of a root; the root itself is the operator's and may be a link."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_below(root: int, parts: tuple[str, ...], *, create: bool) -> Iterator[int]:
    """A descriptor of a directory below `root`. OSError ELOOP or ENOTDIR when a name is a symbolic link or a file."""
    descriptor = os.dup(root)
    try:
        for part in parts:
            if create:
                make_directory(part, descriptor)
            following = os.open(part, _DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = following
        yield descriptor
    finally:
        os.close(descriptor)


def make_directory(name: str, parent: int) -> None:
    """Makes a directory durable, also one that is there: who made it may have died before it was."""
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
    os.fsync(parent)


def make_directories(path: Path) -> None:
    """Makes a directory and those above it durable, also one that is there."""
    made = [path, *(parent for parent in path.parents if not parent.exists())]
    path.mkdir(parents=True, exist_ok=True)
    for directory in made:
        with open_root(directory.parent) as parent:
            os.fsync(parent)


def remove_tree(name: str, parent: int) -> None:
    """Deletes whatever has this name: a tree, a file, or a link (never what it points to). Nothing there: nothing."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError as error:
        # Unlinking a directory is EISDIR on Linux and EPERM by POSIX.
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        shutil.rmtree(name, dir_fd=parent)


def remove_empty_parents(root: int, parts: tuple[str, ...]) -> None:
    """Deletes the directories of a path that are empty, from the innermost up to below the root."""
    for length in range(len(parts), 0, -1):
        with open_below(root, parts[: length - 1], create=False) as parent:
            try:
                os.rmdir(parts[length - 1], dir_fd=parent)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                return
