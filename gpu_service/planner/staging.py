"""Directories that appear whole or not at all: staged beside their place, synced, renamed. Knows no file of theirs."""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = ".staging-"
# Left behind by a planner that was killed; no planner works this long on one directory.
_ABANDONED_SECONDS = 24 * 3600.0


@contextmanager
def stage_directory(target: Path, *, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives an empty directory to fill; when the block ends it becomes `target`.

    Several processes may do this for one target at once: who comes second finds a whole one and drops its own. A target
    that is there and is not whole is replaced. An exception in the block leaves nothing behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    staged = target.parent / f"{_PREFIX}{secrets.token_hex(8)}"
    staged.mkdir()
    try:
        yield staged
        for path in staged.iterdir():
            _sync(path)
        _sync(staged)
        _put_in_place(staged, target, is_whole)
        _sync(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def is_there(target: Path, *, is_whole: Callable[[Path], bool]) -> bool:
    """Whether the directory is there, whole, and stays: whoever put it in its place may have died before it did."""
    if not (target.exists() and is_whole(target)):
        return False
    _sync(target.parent)
    return True


def _put_in_place(staged: Path, target: Path, is_whole: Callable[[Path], bool]) -> None:
    if target.exists() and not is_whole(target):
        # Renamed away first, so that nobody sees a half-deleted directory under the name.
        broken = staged.with_name(f"{_PREFIX}{secrets.token_hex(8)}")
        target.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        staged.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not is_whole(target):
            raise


def _sweep(parent: Path) -> None:
    oldest = time.time() - _ABANDONED_SECONDS
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            abandoned = path.stat().st_mtime < oldest
        except FileNotFoundError:
            continue
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
