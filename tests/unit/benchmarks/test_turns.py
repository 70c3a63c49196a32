"""Turns over real pipes and processes: a side stands still until it is told to go on, and a dead one is found."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers.turns import END, GO, MeasuredProcess, SideFailed

_SIDE = """
from benchmarks.peers.turns import TurnTaker
taker = TurnTaker.of_environment()
done = 0
while taker.tell_and_wait("ready", done=done) == "go":
    done += 1
taker.tell("done", done=done)
"""


def _start(code: str, tmp_path: Path) -> MeasuredProcess:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'clients/python'}"}
    return MeasuredProcess([sys.executable, "-c", code], log=tmp_path / "side.log", environment=environment)


def _deadline() -> float:
    return time.monotonic() + 60


def test_a_side_goes_on_once_for_each_turn(tmp_path: Path) -> None:
    with _start(_SIDE, tmp_path) as side:
        assert side.hear("ready", _deadline()) == {"done": 0}
        for turn in (1, 2):
            side.tell(GO)
            assert side.hear("ready", _deadline()) == {"done": turn}
        side.tell(END)
        assert side.hear("done", _deadline()) == {"done": 2}


def test_a_side_that_ends_early_is_told_with_what_it_printed(tmp_path: Path) -> None:
    with (
        _start("print('no kernel for this'); raise SystemExit(5)", tmp_path) as side,
        pytest.raises(SideFailed, match=r"(?s)status 5.*no kernel for this"),
    ):
        side.hear("ready", _deadline())


def test_a_side_that_is_late_is_given_up(tmp_path: Path) -> None:
    with _start(_SIDE, tmp_path) as side:
        side.hear("ready", _deadline())
        with pytest.raises(SideFailed, match="in time"):
            side.hear("ready", time.monotonic())


def test_another_stage_than_expected_is_a_failure(tmp_path: Path) -> None:
    with _start(_SIDE, tmp_path) as side, pytest.raises(SideFailed, match="expected done"):
        side.hear("done", _deadline())


def test_a_side_does_not_outlive_its_runner(tmp_path: Path) -> None:
    with _start(_SIDE, tmp_path) as side:
        side.hear("ready", _deadline())
        process = side._process
    assert process.returncode is not None
