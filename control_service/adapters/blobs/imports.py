"""Implements `app.ports.ImportRoot`: files below one directory, by relative name, never through a symbolic link."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final

from control_service.adapters.blobs.directories import open_below, open_root, parts_of
from control_service.adapters.blobs.disk_errors import disk_errors
from control_service.domain.errors import FailedPrecondition, InvalidArgument

CHUNK_BYTES: Final = 1024**2


class DirectoryImportRoot:
    """The operator's import root; None: nothing may be imported."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

    async def read(self, path: str) -> AsyncIterator[bytes]:
        """A file in chunks."""
        file = await asyncio.to_thread(self._open, path)
        try:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield chunk
        finally:
            file.close()

    def _open(self, path: str) -> BinaryIO:
        if self._root is None:
            raise FailedPrecondition("PATH_NOT_ALLOWED", "no import root is set; upload the file instead")
        *above, name = parts_of(path)
        with (
            disk_errors(f"import {path}"),
            open_root(self._root) as root,
            open_below(root, tuple(above), create=False) as directory,
        ):
            # Opening a FIFO would wait for its writer.
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InvalidArgument("PATH_NOT_ALLOWED", f"import {path}: not a regular file")
        return os.fdopen(descriptor, "rb")
