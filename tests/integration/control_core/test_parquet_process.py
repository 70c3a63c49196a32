"""Parquet is read by a process of its own: rows and troubles cross over, and its end is the file's trouble alone."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import BinaryIO, cast

import pytest

from control_service.adapters.files import parquet_process
from control_service.domain.dataset_files import FileLimits, Trouble
from control_service.domain.errors import ResourceExhausted
from tests.fakes.dataset_files import as_parquet

ROWS = [{"text": f"é {number}", "turns": [{"from": "gpt"}], "score": 0.5} for number in range(100)]


@pytest.fixture
def stream() -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        yield cast("BinaryIO", file)


def _write(stream: BinaryIO, data: bytes) -> int:
    stream.write(data)
    stream.flush()
    return len(data)


def test_rows_and_the_troubles_of_rows_cross_over(stream: BinaryIO) -> None:
    size = _write(stream, as_parquet([*ROWS, {"text": "a", "score": float("nan")}, {"text": "b", "turns": []}]))
    with parquet_process.open_table(stream, FileLimits(), size, Event()) as (columns, rows):
        assert set(columns) == {"text", "turns", "score"}
        found = list(rows)
    assert [row.content for row in found[:100]] == ROWS
    assert [row.number for row in found] == list(range(1, 103))
    last = found[101].content
    assert last == {"text": "b", "turns": []}


def test_a_damaged_file_and_one_that_is_too_large_are_told_apart(stream: BinaryIO) -> None:
    size = _write(stream, as_parquet(ROWS)[:-9])
    with (
        pytest.raises(Trouble, match="cannot be read as Parquet"),
        parquet_process.open_table(stream, FileLimits(), size, Event()),
    ):
        pass
    stream.seek(0)
    size = _write(stream, as_parquet(ROWS))
    limits = FileLimits(max_ratio=1, ratio_floor_bytes=100)
    with (
        pytest.raises(ResourceExhausted, match="the parquet file becomes"),
        parquet_process.open_table(stream, limits, size // 100, Event()),
    ):
        pass


def test_a_reader_that_dies_is_the_files_trouble(stream: BinaryIO, monkeypatch: pytest.MonkeyPatch) -> None:
    size = _write(stream, as_parquet(ROWS))
    # Less than the library itself takes.
    monkeypatch.setattr(parquet_process, "_MEMORY_BYTES", 60 * 1024**2)
    with (
        pytest.raises(Trouble, match=r"its reader ended with|memory"),
        parquet_process.open_table(stream, FileLimits(), size, Event()) as (_, rows),
    ):
        list(rows)


def test_a_reader_is_gone_when_nobody_wants_more_of_it(stream: BinaryIO) -> None:
    size = _write(stream, as_parquet(ROWS * 200, row_group_size=1000))
    before = _children()
    with parquet_process.open_table(stream, FileLimits(), size, Event()) as (_, rows):
        assert next(rows).content == ROWS[0]
        assert len(_children() - before) == 1
    assert _children() <= before


def test_a_reader_that_is_between_two_lines_ends_when_nobody_wants_them(stream: BinaryIO) -> None:
    size = _write(stream, as_parquet(ROWS * 200, row_group_size=1000))
    unwanted = Event()
    before = _children()
    with parquet_process.open_table(stream, FileLimits(), size, unwanted) as (_, rows):
        assert next(rows).content == ROWS[0]
        (reader,) = _children() - before
        # It says nothing more, as one does that works.
        os.kill(int(reader), signal.SIGSTOP)
        unwanted.set()
        with pytest.raises(Trouble, match="ended with SIGKILL"):
            list(rows)


def _children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_a_reader_that_spins_is_ended_by_the_kernel(stream: BinaryIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of a processor is not enough for these rows, nor for a loop in native code that never returns."""
    monkeypatch.setattr(parquet_process, "_CPU_SECONDS", 1)
    monkeypatch.setattr(parquet_process, "_BYTES_PER_CPU_SECOND", 1 << 60)
    size = _write(stream, as_parquet(ROWS * 5000, row_group_size=100_000))
    with (
        pytest.raises(Trouble, match=r"ended with SIG(XCPU|KILL)"),
        parquet_process.open_table(stream, FileLimits(), size, Event()) as (_, rows),
    ):
        for _ in rows:
            pass
