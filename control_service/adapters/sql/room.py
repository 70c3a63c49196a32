"""Whether the database's disk has room for changes, found out beside the database. Changes nothing in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

# Enough for the log that a commit writes and what a checkpoint of it adds to the file.
_ROOM_BYTES: Final = 1024**2
_TRIAL_NAME: Final = ".room"


def is_short(directory: Path) -> bool:
    """The file system says that less than that is left; quotas and reserves it need not know."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize < _ROOM_BYTES


def can_be_written(directory: Path) -> bool:
    """Writes that much, syncs it and deletes it. False: it could not be done."""
    trial = directory / _TRIAL_NAME
    try:
        with trial.open("wb") as file:
            file.write(b"\0" * _ROOM_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    finally:
        trial.unlink(missing_ok=True)
    return True
