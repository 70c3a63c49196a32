"""Directories appear whole or not at all; progress is said at most ten times a second and always at the end."""

import io
import json
import os
from pathlib import Path

import pytest

from gpu_service.planner.progress import Progress
from gpu_service.planner.staging import is_there, stage_directory


def is_whole(directory: Path) -> bool:
    return (directory / "file").is_file()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill_and_fail() -> None:
        with stage_directory(tmp_path / "target", is_whole=is_whole) as staged:
            (staged / "file").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_and_fail()
    assert names(tmp_path) == []


def test_the_first_to_finish_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with stage_directory(target, is_whole=is_whole) as slow:
        (slow / "file").write_bytes(b"slow")
        with stage_directory(target, is_whole=is_whole) as quick:
            (quick / "file").write_bytes(b"quick")
    assert (target / "file").read_bytes() == b"quick"
    assert names(tmp_path) == ["target"]


def test_what_is_not_whole_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "other").write_bytes(b"")
    with stage_directory(target, is_whole=is_whole) as staged:
        (staged / "file").write_bytes(b"new")
    assert names(target) == ["file"]
    assert names(tmp_path) == ["target"]


def test_only_a_whole_one_is_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert not is_there(target, is_whole=is_whole)
    target.mkdir()
    assert not is_there(target, is_whole=is_whole)
    (target / "file").write_bytes(b"")
    assert is_there(target, is_whole=is_whole)


def test_what_a_killed_planner_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    for name, modified in (("old", 0), ("new", None)):
        (tmp_path / f".staging-{name}").mkdir()
        if modified is not None:
            os.utime(tmp_path / f".staging-{name}", (modified, modified))
    with stage_directory(tmp_path / "target", is_whole=is_whole) as staged:
        (staged / "file").write_bytes(b"")
    assert names(tmp_path) == [".staging-new", "target"]


def test_progress_is_said_ten_times_a_second_and_at_the_end() -> None:
    stream, seconds = io.StringIO(), iter(range(10**6))
    progress = Progress(stream, total=1000, clock=lambda: next(seconds) / 1000)
    for _ in range(1000):
        progress.advance(1)
    progress.finish()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    # One second by that clock: the first, ten more at most, and the end.
    assert 10 <= len(lines) <= 12
    assert lines[-1] == {"type": "progress", "unit": "examples", "done": 1000, "total": 1000}
    progress.finish()
    assert len(stream.getvalue().splitlines()) == len(lines)
