"""Child processes of `up` and `demo`: waited for, stopped, and explained when they end by themselves."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fakes.pair import wait_for
from tunesmith_cli.services import ServiceFailed, ServiceProcess

READY = """
import json, os, pathlib, sys, time
print("up", flush=True)
path = pathlib.Path(sys.argv[sys.argv.index("--ready-file") + 1])
staged = path.with_suffix(".staged")
staged.write_text(json.dumps({"address": "127.0.0.1:9", "pid": os.getpid()}))
staged.replace(path)
time.sleep(600)
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + READY
BROKEN = "import sys; print('port 1 is taken'); sys.exit(3)"
NEVER_READY = "import time; print('thinking', flush=True); time.sleep(600)"


class Lines:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, name: str, line: str) -> None:
        self.seen.append((name, line))


class Starter:
    """Starts services and kills at the end what a failed test left."""

    def __init__(self, directory: Path) -> None:
        self.ready_file = directory / "run" / "service.json"
        self.lines = Lines()
        self.started: list[ServiceProcess] = []

    def __call__(self, code: str) -> ServiceProcess:
        service = ServiceProcess("gpu", [sys.executable, "-c", code], ready_file=self.ready_file, sink=self.lines)
        self.started.append(service)
        return service


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for service in starter.started:
        service.kill_group()


def test_a_service_is_ready_when_it_says_so_and_stops_when_asked(start: Starter) -> None:
    service = start(READY)
    assert service.wait_ready(stopped=threading.Event()) == "127.0.0.1:9"
    assert service.stop() == -signal.SIGTERM
    assert start.lines.seen == [("gpu", "up")]


def test_the_ready_file_of_a_dead_service_is_not_believed(start: Starter) -> None:
    start.ready_file.parent.mkdir(parents=True)
    start.ready_file.write_text('{"address": "127.0.0.1:1", "pid": 1}')
    assert start(READY).wait_ready(stopped=threading.Event()) == "127.0.0.1:9"


def test_one_that_ends_before_it_is_ready_is_explained(start: Starter) -> None:
    with pytest.raises(ServiceFailed) as raised:
        start(BROKEN).wait_ready(stopped=threading.Event())
    assert "gpu exited with status 3" in str(raised.value)
    assert "port 1 is taken" in str(raised.value)


def test_one_that_is_never_ready_is_given_up(start: Starter) -> None:
    with pytest.raises(ServiceFailed, match="not ready after"):
        start(NEVER_READY).wait_ready(stopped=threading.Event(), limit_seconds=0.3)


def test_one_that_does_not_stop_is_killed(start: Starter) -> None:
    service = start(STUBBORN)
    service.wait_ready(stopped=threading.Event())
    assert service.stop(limit_seconds=0.2) == -signal.SIGKILL


def test_ctrl_c_in_a_terminal_reaches_children_only_through_stop(start: Starter) -> None:
    service = start(READY)
    service.wait_ready(stopped=threading.Event())
    assert os.getpgid(service.pid) == service.pid
    assert os.getpgid(service.pid) != os.getpgid(0)


def test_up_says_why_a_service_did_not_start(tmp_path: Path) -> None:
    # A file where a directory must be: whichever service looks at it first refuses.
    (tmp_path / "data").write_text("")
    command = [sys.executable, "-m", "tunesmith_cli.main", "up", "--data", str(tmp_path / "data")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert result.returncode in (1, 2)
    assert result.stderr


def test_wait_for_names_what_it_waited_for() -> None:
    with pytest.raises(AssertionError, match="the moon"):
        wait_for("the moon", lambda: False, seconds=0.1)
