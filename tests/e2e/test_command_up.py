"""`tunesmith up` as a person runs it: both services in the foreground, stopped cleanly, never one without the other."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fakes.pair import wait_for

pytestmark = pytest.mark.timeout(180)


class Up:
    """A running `tunesmith up`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "up.log"
        command = [sys.executable, "-m", "tunesmith_cli.main", "up", "--data", str(directory)]
        ports = ["--control-address", "127.0.0.1:0", "--gpu-address", "127.0.0.1:0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *ports], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_ready(self) -> list[psutil.Process]:
        """Waits until both services are ready; gives their processes."""
        wait_for("both services", lambda: "ready: control at" in self.log.read_text() or self.process.poll())
        assert self.process.poll() is None, self.log.read_text()
        files = [self.directory / "run" / f"{name}.json" for name in ("control", "gpu")]
        return [psutil.Process(json.loads(file.read_text())["pid"]) for file in files]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    running = Up(tmp_path)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.terminate()
        running.process.wait(90)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_are_stopped_cleanly(up: Up, number: signal.Signals) -> None:
    services = up.wait_ready()
    up.process.send_signal(number)
    assert up.process.wait(90) == 0, up.log.read_text()
    assert not any(service.is_running() for service in services)


def test_every_line_says_whose_it_is(up: Up) -> None:
    up.wait_ready()
    lines = up.log.read_text().splitlines()
    assert {line.split("|")[0].strip() for line in lines if "|" in line} <= {"control", "gpu"}


@pytest.mark.parametrize("index", [0, 1])
def test_when_one_dies_the_other_is_stopped_and_the_status_says_so(up: Up, index: int) -> None:
    services = up.wait_ready()
    os.kill(services[index].pid, signal.SIGKILL)
    assert up.process.wait(90) == 1
    assert not any(service.is_running() for service in services)
    assert "was killed by signal 9" in up.log.read_text()


def test_a_second_pair_on_the_same_directory_refuses_and_leaves_the_first_alone(up: Up) -> None:
    services = up.wait_ready()
    command = [sys.executable, "-m", "tunesmith_cli.main", "up", "--data", str(up.directory)]
    ports = ["--control-address", "127.0.0.1:0", "--gpu-address", "127.0.0.1:0"]
    second = subprocess.run([*command, *ports], capture_output=True, timeout=120)
    assert second.returncode == 1
    assert all(service.is_running() for service in services)
