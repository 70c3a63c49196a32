"""Signs of progress in the midst of work on big files and models. Refuses to give any because time went by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

# A disk that is slower than this in the midst of one file is taken for one that stands still.
SLOWEST_BYTES_PER_SECOND = 8 * 1024 * 1024


class Pace(Protocol):
    """Who hears of progress."""

    def note_progress(self) -> None: ...

    def announce_bytes(self, num_bytes: int) -> None:
        """So many bytes are about to be read or written in one piece, without a sign before its end."""


class _Nobody:
    def note_progress(self) -> None:
        pass

    def announce_bytes(self, num_bytes: int) -> None:
        pass


NOBODY: Pace = _Nobody()


@contextmanager
def in_one_piece(pace: Pace, num_bytes: int) -> Iterator[None]:
    """Around what reads or writes so much in one call."""
    pace.announce_bytes(num_bytes)
    yield
    pace.note_progress()


@contextmanager
def each_module(check: Callable[[], None]) -> Iterator[None]:
    """`check` is called at every module that any model passes inside; it may raise to stop."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    def look(_module: Any, _inputs: Any) -> None:
        check()

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
