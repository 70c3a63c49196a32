"""Room on the node's disk: a full one is a refusal of its own, and what a run will write is compared with what is free.

Decides by free bytes of the data directory's file system alone. Refuses to reserve any.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_service.domain.checked_plan import CheckedPlan
from gpu_service.domain.disk import estimate_disk
from gpu_service.domain.errors import Fault, Refusal

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def disk_full(message: str) -> Refusal:
    """The refusal of what finds no room."""
    return Refusal("DISK_FULL", Fault.PLATFORM, message)


@contextmanager
def full_disk_is_a_refusal(what: str) -> Iterator[None]:
    """Raises `Refusal` DISK_FULL for an OSError of a full disk inside; `what` was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise disk_full(f"{what}: {error.strerror}") from error


def require_room(directory: Path, checked: CheckedPlan) -> None:
    """Raises `Refusal` DISK_FULL (details `needed_bytes`, `free_bytes`) when not even one checkpoint and the artifacts
    of the run fit. Blocks for a look at the file system.
    """
    disk = estimate_disk(checked)
    free_bytes = shutil.disk_usage(directory).free
    if disk.least_bytes > free_bytes:
        raise Refusal(
            "DISK_FULL",
            Fault.PLATFORM,
            f"a checkpoint and the artifacts of this run take about {disk.least_bytes} bytes; {free_bytes} are free",
            details={"needed_bytes": str(disk.least_bytes), "free_bytes": str(free_bytes)},
        )


def room_warnings(directory: Path, checked: CheckedPlan) -> list[str]:
    """What a plan says of a disk that will be full before the run is over. Blocks for a look at the file system."""
    disk = estimate_disk(checked)
    free_bytes = shutil.disk_usage(directory).free
    if disk.most_bytes <= free_bytes:
        return []
    return [
        f"the run keeps up to {disk.most_bytes} bytes on the node's disk ({disk.checkpoint_bytes} a checkpoint, "
        f"{disk.artifact_bytes} of artifacts), and {free_bytes} are free: saves that find no room are left out"
    ]
