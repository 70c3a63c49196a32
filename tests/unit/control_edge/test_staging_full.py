"""A staged file whose last bytes find no room is gone when it is given up: it would keep the disk full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from control_service.adapters.blobs.disk import BlobDirectory
from control_service.domain.errors import ResourceExhausted


class _FullFile:
    """A buffered file whose buffer finds no room, at its end too."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_bytes_that_found_no_room_do_not_stay(tmp_path: Path) -> None:
    directory = BlobDirectory(tmp_path)
    directory.open()
    file = directory.stage(max_bytes=100)
    file._file = _FullFile(file._file)  # type: ignore[assignment]
    with pytest.raises(ResourceExhausted, match="DISK_FULL"):
        file.append(b"a" * 10)
    file.abandon()
    assert list((tmp_path / "staging").iterdir()) == []
