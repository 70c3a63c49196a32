"""The output tree that people read: directories made from blobs, staged beside their place and renamed. Blocking.

Files are hard links to blobs where the disk allows, so that an artifact takes its bytes once, and copies elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from control_service.adapters.blobs.directories import (
    open_below,
    open_root,
    parts_of,
    remove_empty_parents,
    remove_tree,
)
from control_service.adapters.blobs.disk import BlobDirectory
from control_service.adapters.blobs.disk_errors import disk_errors
from control_service.domain.artifact import FileReference
from control_service.domain.errors import Internal, NotFound, TunesmithError
from control_service.domain.failpoints import failpoint

# Another file system, too many links, or a file system without them: copy instead.
_CANNOT_LINK: Final = frozenset({errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP})
_COPY_BYTES: Final = 1024**2


class OutputTree:
    """One output root."""

    def __init__(self, *, root: Path, blobs: BlobDirectory, link: Callable[..., None] = os.link) -> None:
        self._root = root
        self._blobs = blobs
        self._link = link

    def open(self) -> None:
        """Makes the root."""
        with disk_errors("the output root"):
            self._root.mkdir(parents=True, exist_ok=True)

    def materialize(self, path: str, files: Sequence[FileReference]) -> None:
        """Makes `<root>/<path>/` hold exactly these files; replaces what is there."""
        *above, name = parts_of(path)
        staging, replaced = f".staging-{name}", f".replaced-{name}"
        with (
            disk_errors(f"output {path}"),
            open_root(self._root) as root,
            open_below(root, tuple(above), create=True) as parent,
        ):
            # What an earlier attempt left is of the same name, so nothing piles up.
            remove_tree(staging, parent)
            remove_tree(replaced, parent)
            os.mkdir(staging, dir_fd=parent)
            try:
                with open_below(parent, (staging,), create=False) as top:
                    for file in files:
                        self._place(file, top)
                    os.fsync(top)
            except (OSError, TunesmithError):
                remove_tree(staging, parent)
                raise
            try:
                os.rename(name, replaced, src_dir_fd=parent, dst_dir_fd=parent)
            except FileNotFoundError:
                replaced = ""
            failpoint("output.between-renames")
            os.rename(staging, name, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
            if replaced:
                remove_tree(replaced, parent)

    def remove(self, path: str) -> None:
        """Deletes `<root>/<path>/` and the directories that this leaves empty."""
        *above, name = parts_of(path)
        with disk_errors(f"output {path}"), open_root(self._root) as root:
            try:
                with open_below(root, tuple(above), create=False) as parent:
                    remove_tree(name, parent)
                    remove_tree(f".staging-{name}", parent)
                    os.fsync(parent)
                remove_empty_parents(root, tuple(above))
            except FileNotFoundError:
                # A directory above it is not there, so neither is it.
                return

    def _place(self, file: FileReference, top: int) -> None:
        *above, name = parts_of(file.path)
        source = self._blobs.path(file.sha256)
        try:
            size_bytes = source.stat().st_size
        except FileNotFoundError as error:
            raise NotFound("BLOB_NOT_FOUND", f"the bytes of {file.path} are not in the store") from error
        if size_bytes != file.size_bytes:
            raise Internal("INTERNAL", f"{file.path} has {size_bytes} bytes in the store, {file.size_bytes} on record")
        with open_below(top, tuple(above), create=True) as directory:
            try:
                self._link(source, name, dst_dir_fd=directory, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _CANNOT_LINK:
                    raise
                _copy(source, name, directory, sha256=file.sha256)
            os.fsync(directory)


def _copy(source: Path, name: str, directory: int, *, sha256: str) -> None:
    """Copies bytes, durable and verified."""
    digest = hashlib.sha256()
    descriptor = os.open(
        name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=directory
    )
    with source.open("rb") as reader, os.fdopen(descriptor, "wb") as writer:
        while chunk := reader.read(_COPY_BYTES):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    if digest.hexdigest() != sha256:
        raise Internal("INTERNAL", f"blob {sha256} is damaged on disk")
