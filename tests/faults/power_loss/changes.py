"""What a file system was told, one change at a time. Inodes are numbered by the recorder; nothing is done here."""

from __future__ import annotations

from dataclasses import dataclass

ROOT = 0


@dataclass(frozen=True, slots=True)
class Make:
    """A file or directory came to be; nothing names it yet."""

    inode: int
    is_directory: bool


@dataclass(frozen=True, slots=True)
class Enter:
    """A directory has a name for an inode: it was created there, or linked."""

    directory: int
    name: str
    inode: int


@dataclass(frozen=True, slots=True)
class Remove:
    """A directory lost a name."""

    directory: int
    name: str
    inode: int


@dataclass(frozen=True, slots=True)
class Move:
    """Rename: the old name goes and the new one is there, or neither."""

    source: int
    source_name: str
    target: int
    target_name: str
    inode: int


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes at an offset."""

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    """A file is this long."""

    inode: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Sync:
    """Everything that was told of the inode so far is on the disk: a file's bytes, or a directory's names."""

    inode: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """The writer told somebody: from now on it must not be lost."""

    what: str


Change = Make | Enter | Remove | Move | Write | Truncate | Sync | Acknowledge
