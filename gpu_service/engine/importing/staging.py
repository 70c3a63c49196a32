"""Puts a finished model directory under its name: all of it or nothing, and durable once it is there.

The work happens in a hidden directory beside the target, so that the last step is one rename on one file system. It
refuses names that could leave the models directory and, unless told to replace, a name that is taken.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpu_service.engine.importing.errors import ImportRefused, Reason, storage_errors

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_STAGING_PREFIX = ".importing-"
_RETIRED_PREFIX = ".retired-"


@dataclass(frozen=True)
class ModelName:
    """`organization/model`, safe to use as a path."""

    organization: str
    model: str

    @classmethod
    def parse(cls, text: str) -> ModelName:
        parts = text.split("/")
        if len(parts) != 2 or any(not _PART.fullmatch(part) or ".." in part for part in parts):
            raise ImportRefused(
                Reason.INVALID_NAME,
                f"{text!r} is not a model name: it must be organization/name, each of letters, digits, '.', '_' and "
                "'-', beginning with a letter or digit and without '..'",
            )
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.organization}/{self.model}"


@contextmanager
def staged(models_directory: Path, name: ModelName, *, replace: bool) -> Iterator[Path]:
    """Yield an empty directory; on a normal exit it becomes the model, on any other it is removed."""
    parent = models_directory / name.organization
    target = parent / name.model
    with storage_errors():
        # Checked first so that nobody waits for a download that cannot be kept; the rename below checks again.
        if not replace and os.path.lexists(target):
            raise _taken(name)
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{_STAGING_PREFIX}{name.model}-", dir=parent))
    try:
        yield work
        with storage_errors():
            _make_durable(work)
            _move_into_place(work, target, name, replace=replace)
            sync_directory(parent)
            sync_directory(models_directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_durable(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            sync_directory(path)
            continue
        # Libraries leave some files readable by their writer only; engines may run as another user.
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    directory.chmod(0o755)
    sync_directory(directory)


def _move_into_place(work: Path, target: Path, name: ModelName, *, replace: bool) -> None:
    if replace and os.path.lexists(target):
        _replace(work, target)
        return
    try:
        work.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _taken(name) from error
        raise


def _replace(work: Path, target: Path) -> None:
    """Two renames, the old model kept until the new one is in place; engines that have it open go on undisturbed."""
    retired = Path(tempfile.mkdtemp(prefix=f"{_RETIRED_PREFIX}{target.name}-", dir=target.parent))
    old = retired / target.name
    target.rename(old)
    try:
        work.rename(target)
    except OSError:
        old.rename(target)
        retired.rmdir()
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _taken(name: ModelName) -> ImportRefused:
    return ImportRefused(Reason.ALREADY_EXISTS, f"a model named {name} is already there; --replace replaces it")
