"""What a file was when its bytes were hashed: one that nobody touched since then need not be hashed again.

Whoever writes to a file, replaces it or sets its date back changes its inode or its time of change, which nobody can
set. What was written just before it was hashed may be written again within the same tick of the clock, so such a file
is not remembered. Says nothing of disks that return other bytes than they were given. Hashes nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

# Longer than any file system's clock takes for a tick.
UNSETTLED_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """Equal before and after: the same bytes. Times are nanoseconds since 1970."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Of the file that a link leads to. Raises OSError."""
        status = path.stat()
        return cls(
            device=status.st_dev,
            inode=status.st_ino,
            size_bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            changed_ns=status.st_ctime_ns,
        )

    def is_settled(self) -> bool:
        """Whether a later change will show: ask before the bytes are read."""
        return max(self.modified_ns, self.changed_ns) < time.time_ns() - UNSETTLED_SECONDS * 1e9

    def to_json(self) -> list[int]:
        """For a record."""
        return list(astuple(self))

    @classmethod
    def from_json(cls, value: Sequence[int]) -> FileIdentity:
        """What `to_json` gave. Raises ValueError, TypeError."""
        device, inode, size_bytes, modified_ns, changed_ns = value
        return cls(device=device, inode=inode, size_bytes=size_bytes, modified_ns=modified_ns, changed_ns=changed_ns)
