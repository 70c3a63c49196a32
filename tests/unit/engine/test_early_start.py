"""What is begun for a run while the engine imports its libraries, by a planner that a shell plays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpu_service.engine.early_start import EarlyStart
from gpu_service.engine.planning import Begun
from gpu_service.engine.spare_planner import SparePlanner
from gpu_service.engine.stopping import StopMode, StopSwitch

# Nothing may end the thread but what it expects.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

_RUN: Mapping[str, Any] = {
    "job_id": "job",
    "attempt": 1,
    "spec_digest": "0",
    "spec": {"base_model": "a/b"},
    "weights_digest": "12ab",
    "model_directory": "/m",
    "blobs_directory": "/b",
    "cache_directory": "/c",
    "device": {"type": "cpu", "index": -1},
}


@pytest.fixture
def early() -> Iterator[EarlyStart]:
    # It says what it was asked, on one line.
    command = ("/bin/sh", "-c", "tr -d '\\n' < $1", "planner")
    early = EarlyStart(device_id="cpu:-1", planner=SparePlanner(("/nothing",)), planner_command=command)
    early.begin()
    yield early
    early.end_imports()


def _make_run(directory: Path, **changes: Any) -> Path:
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps({**_RUN, **changes}), encoding="utf-8")
    return directory


def _read(begun: Begun | None) -> dict[str, Any]:
    assert begun is not None
    assert begun.child.stdout is not None
    with begun.child.stdout as lines:
        asked: dict[str, Any] = json.loads(lines.read())
    begun.child.wait()
    return asked


def test_the_first_run_that_comes_is_planned_and_its_plan_is_taken_once(early: EarlyStart, tmp_path: Path) -> None:
    first, second = _make_run(tmp_path / "first"), _make_run(tmp_path / "second")
    early.offer(first)
    early.offer(second)
    early.end_imports()
    assert early.take(second) is None
    asked = _read(early.take(first))
    assert asked["weights_digest"] == "12ab"
    assert (asked["device"]["type"], asked["device"]["kernel_problem"]) == ("cpu", "")
    assert asked["device"]["total_memory_bytes"] > 0
    assert early.take(first) is None
    assert not (second / "planner-request.json").exists()


def test_a_run_that_comes_behind_the_imports_is_planned_when_it_is_taken_up(early: EarlyStart, tmp_path: Path) -> None:
    run = _make_run(tmp_path / "run")
    early.end_imports()
    early.offer(run)
    assert early.take(run) is None
    assert not (run / "planner-request.json").exists()


@pytest.mark.parametrize(
    "changes", [{"spec": {"task": "export"}}, {"spec": {"base_model": 3}}, {"device": {}}, {"attempt": "one"}]
)
def test_what_cannot_be_planned_is_left_to_the_run(changes: Any, early: EarlyStart, tmp_path: Path) -> None:
    run = _make_run(tmp_path / "run", **changes)
    early.offer(run)
    assert early.take(run) is None


def test_a_run_whose_file_is_gone_is_left_to_the_run(early: EarlyStart, tmp_path: Path) -> None:
    early.offer(tmp_path / "nothing")
    assert early.take(tmp_path / "nothing") is None


def test_a_driver_that_is_not_there_is_left_to_the_run(tmp_path: Path) -> None:
    early = EarlyStart(device_id="cuda:4096", planner=SparePlanner(("/nothing",)), planner_command=("/bin/true",))
    early.begin()
    run = _make_run(tmp_path / "run")
    early.offer(run)
    assert early.take(run) is None
    assert early.head_start is None


def test_a_planner_whose_run_was_never_taken_up_ends_with_the_engine(tmp_path: Path) -> None:
    command = ("/bin/sh", "-c", "exec sleep 600", "planner")
    early = EarlyStart(device_id="cpu:-1", planner=SparePlanner(("/nothing",)), planner_command=command)
    early.begin()
    early.offer(_make_run(tmp_path / "run"))
    early._thread.join()
    assert early._begun is not None
    child = early._begun.child
    early.close()
    assert child.returncode == -signal.SIGKILL
    # Nobody has it any more.
    assert early.take(tmp_path / "run") is None


def test_without_a_device_nothing_is_begun(tmp_path: Path) -> None:
    early = EarlyStart(device_id="", planner=SparePlanner(("/nothing",)), planner_command=("/bin/true",))
    early.begin()
    run = _make_run(tmp_path / "run")
    early.offer(run)
    assert early.take(run) is None
    assert not (run / "planner-request.json").exists()
    early.close()


def _begin(device: Mapping[str, Any], script: str = "sleep 600") -> Begun:
    child = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, process_group=0)
    return Begun(child=child, device=device, errors_path=Path("/nothing"), oom_kills_before=0)


def test_a_plan_is_for_the_device_that_it_was_begun_for() -> None:
    device = {"type": "cuda", "name": "a card", "total_memory_bytes": 80, "free_memory_bytes": 70, "kernel_problem": ""}
    begun = _begin(device)
    assert begun.is_for({**device, "free_memory_bytes": 60})
    assert not begun.is_for({**device, "kernel_problem": "no compiler"})
    assert not begun.is_for({"type": "cpu", "name": "cpu", "total_memory_bytes": 80, "free_memory_bytes": 70})
    begun.end()
    assert begun.child.returncode != 0


def test_a_planner_that_is_given_up_and_has_ended_is_reaped() -> None:
    begun = _begin({}, "exit 0")
    begun.child.wait()
    begun.end()
    assert begun.child.returncode == 0


def test_a_stop_that_came_meanwhile_ends_the_planner() -> None:
    begun = _begin({})
    switch = StopSwitch()
    switch.request(StopMode.CANCEL)
    with switch.owning(begun.child):
        pass
    assert begun.child.returncode == -9
    begun.end()


def test_nothing_of_it_needs_torch() -> None:
    program = (
        "import sys; from gpu_service.engine import device_facts, early_start, entrypoint, planning, request; "
        "print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    assert said.stdout.strip() == "False"
