"""The planner that waits: who gets it, and what becomes of it when it is gone or nobody wants it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_service.engine.spare_planner import SparePlanner

# Says which request it was given, as a planner says where its plan is.
_ECHO = "import json, sys; line = sys.stdin.readline(); line and print(json.loads(line)['request'])"


@pytest.fixture
def planner() -> Iterator[SparePlanner]:
    planner = SparePlanner((sys.executable, "-c", _ECHO))
    yield planner
    planner.close()


def test_it_is_given_away_once(planner: SparePlanner, tmp_path: Path) -> None:
    assert planner.take(tmp_path / "a.json", tmp_path / "log") is None
    planner.prepare()
    waiting = planner.pid
    planner.prepare()
    assert planner.pid == waiting
    child = planner.take(tmp_path / "a.json", tmp_path / "log")
    assert child is not None
    assert planner.pid is None
    assert child.stdout is not None
    with child.stdout as answer:
        assert answer.read().decode().strip() == str(tmp_path / "a.json")
    assert child.wait() == 0
    assert planner.take(tmp_path / "b.json", tmp_path / "log") is None


def test_one_that_was_killed_is_not_used(planner: SparePlanner, tmp_path: Path) -> None:
    planner.prepare()
    assert planner.pid is not None
    pid = planner.pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert planner.take(tmp_path / "a.json", tmp_path / "log") is None
    planner.prepare()
    assert planner.pid not in (None, pid)


def test_one_that_nobody_wants_ends_by_itself(tmp_path: Path) -> None:
    planner = SparePlanner((sys.executable, "-m", "gpu_service.planner", "--wait"))
    planner.prepare()
    pid = planner.pid
    planner.close()
    assert planner.pid is None
    assert not Path(f"/proc/{pid}").exists()


def test_a_program_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    planner = SparePlanner((str(tmp_path / "nothing"),))
    planner.prepare()
    assert planner.pid is None
    assert planner.take(tmp_path / "a.json", tmp_path / "log") is None


def test_the_waiting_planner_answers_and_logs_where_it_is_told_to(tmp_path: Path) -> None:
    planner = SparePlanner()
    planner.prepare()
    request, log = tmp_path / "request.json", tmp_path / "planner.log"
    request.write_text(json.dumps({"spec": {}}), encoding="utf-8")
    child = planner.take(request, log)
    assert child is not None
    assert child.stdout is not None
    with child.stdout as answer:
        assert answer.read() == b""
    assert child.wait() == 2
    assert "not a planner request" in log.read_text()
