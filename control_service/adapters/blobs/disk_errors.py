"""Names what the operating system refuses in the domain's words: one table from errno."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from control_service.domain.errors import InvalidArgument, NotFound, ResourceExhausted, TunesmithError, Unavailable

_NAMED: Final[Mapping[int, tuple[type[TunesmithError], str, str]]] = {
    errno.ENOSPC: (ResourceExhausted, "DISK_FULL", "the disk is full"),
    errno.EDQUOT: (ResourceExhausted, "DISK_FULL", "the disk quota is used up"),
    errno.ENOENT: (NotFound, "BLOB_NOT_FOUND", "there is no such file"),
    # O_NOFOLLOW met a symbolic link, or a path goes through something that is not a directory.
    errno.ELOOP: (InvalidArgument, "PATH_NOT_ALLOWED", "the path leads through a symbolic link"),
    errno.ENOTDIR: (InvalidArgument, "PATH_NOT_ALLOWED", "the path leads through something that is not a directory"),
    errno.ENAMETOOLONG: (InvalidArgument, "PATH_NOT_ALLOWED", "a name of the path is too long"),
}


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Raises the domain's error for an OSError inside; `what` names the thing, never its place on this machine."""
    try:
        yield
    except OSError as error:
        kind, reason, text = _NAMED.get(
            error.errno or 0, (Unavailable, "STORE_UNAVAILABLE", f"the disk refused: {error.strerror}")
        )
        raise kind(reason, f"{what}: {text}") from error
