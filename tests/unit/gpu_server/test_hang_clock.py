"""When no progress is a hang, on a clock of the test's own; and what is told of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from gpu_service.shim import stacks
from gpu_service.shim.hang_clock import HangClock


def test_it_stands_still_without_work() -> None:
    clock = HangClock(limit_seconds=10)
    assert clock.deadline is None
    assert not clock.is_over(1e9)
    clock.begin(100)
    assert clock.deadline == 110
    clock.end()
    clock.note_progress(105)
    assert clock.deadline is None


def test_progress_moves_the_deadline_and_its_lack_is_a_hang() -> None:
    clock = HangClock(limit_seconds=10)
    clock.begin(0)
    clock.note_progress(0.25)
    assert not clock.is_over(10.2)
    assert clock.is_over(10.25)
    assert clock.idle_seconds(10.25) == 10


def test_what_was_slow_in_a_phase_may_be_slow_again_but_not_in_the_next() -> None:
    clock = HangClock(limit_seconds=10)
    clock.begin(0)
    clock.note_progress(1)
    clock.note_progress(1.1)
    assert clock.limit_seconds == 20
    assert not clock.is_over(21)
    assert clock.is_over(21.1)
    clock.begin(200)
    assert clock.limit_seconds == 10


def test_however_slow_a_phase_was_its_limit_is_bounded() -> None:
    """Else each pause would allow one that is twenty times as long: a hang would never be found."""
    clock = HangClock(limit_seconds=10)
    clock.begin(0)
    now = 0.0
    for pause in (9.9, 39, 39):
        now += pause
        assert not clock.is_over(now)
        clock.note_progress(now)
        assert clock.limit_seconds == 40
    assert clock.is_over(now + 40)


def test_a_pause_that_was_announced_is_allowed_once_and_nothing_is_judged_by_it() -> None:
    clock = HangClock(limit_seconds=10)
    clock.begin(0)
    clock.note_progress(0, next_pause_seconds=200)
    assert not clock.is_over(209)
    assert clock.is_over(210)
    clock.note_progress(205)
    assert clock.limit_seconds == 10


def test_time_in_which_the_shim_did_not_run_is_not_the_engines() -> None:
    clock = HangClock(limit_seconds=10)
    clock.begin(0)
    clock.sleep_until(8, 1)
    # Stopped for ten minutes, together with its engine.
    assert clock.wake_up(608) == 600
    assert not clock.is_over(608)
    assert clock.idle_seconds(608) == 1
    clock.sleep_until(617, 608)
    assert clock.wake_up(618) == 0
    assert clock.is_over(618)


def test_a_machine_that_stood_still_beyond_the_deadline_gives_the_engine_time_to_go_on() -> None:
    clock = HangClock(limit_seconds=10)
    clock.begin(0)
    clock.sleep_until(10, 0)
    clock.wake_up(600)
    assert not clock.is_over(600)
    assert clock.deadline == 610


def test_a_process_that_does_not_tell_its_stacks_is_told_of_by_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_text("before\n")
    with subprocess.Popen(["sleep", "600"]) as child:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        told = stacks.capture(engine_pid=child.pid, members=[child.pid, 2**22 + 1], log=tmp_path / "engine.log")
        assert child.poll() is None
        child.kill()
    assert "does not tell its stacks" in told
    assert f"process {child.pid} (sleep): T (stopped)" in told
    assert stacks.describe_stuck([child.pid]) == ""
    assert "before" not in told


_MANY_THREADS = """
import faulthandler, sys, threading

faulthandler.register(int(sys.argv[1]), all_threads=True)
waits = threading.Event()
for _ in range(60):
    threading.Thread(target=waits.wait, daemon=True).start()


def train_a_step():
    print("ready", flush=True)
    waits.wait()


train_a_step()
"""


def _told_by(program: str, log: Path) -> str:
    """What a process tells that runs `program`, which is given the signal's number; it lives on afterwards."""
    command = [sys.executable, "-c", program, str(int(stacks.STACKS_SIGNAL))]
    with log.open("wb") as stream, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream) as child:
        assert child.stdout is not None
        child.stdout.readline()
        told = stacks.capture(engine_pid=child.pid, members=[child.pid], log=log)
        lives_on = child.poll() is None
        child.kill()
    assert lives_on
    return told


def test_the_thread_that_trains_is_told_of_first(tmp_path: Path) -> None:
    """Behind many that wait for work a screenful would not reach it."""
    log = tmp_path / "engine.log"
    told = _told_by(_MANY_THREADS, log)
    current, _, rest = told.partition("\n\n")
    assert current.startswith("Current thread")
    assert "in train_a_step" in current
    assert "in train_a_step" not in rest
    # The others follow, as far as there is room.
    assert rest.count("in wait") > 10
    assert len(told) == 12_000
    assert log.stat().st_size > 12_000


# What LLVM does when Triton compiles a kernel, to the signals of its own list (lib/Support/Unix/Signals.inc).
_COMPILES = """
import ctypes, faulthandler, signal, sys, time

faulthandler.register(int(sys.argv[1]), all_threads=True)
library = ctypes.CDLL(None)
library.signal.argtypes = ctypes.c_int, ctypes.c_void_p
for name in "HUP INT TERM USR2 ILL TRAP ABRT FPE BUS SEGV QUIT SYS XCPU XFSZ USR1".split():
    library.signal(getattr(signal, f"SIG{name}"), ctypes.cast(library.getpid, ctypes.c_void_p))
print("ready", flush=True)
time.sleep(600)
"""


def test_a_compiler_that_takes_signals_leaves_the_one_for_stacks(tmp_path: Path) -> None:
    assert _told_by(_COMPILES, tmp_path / "engine.log").startswith("Current thread")


def test_what_a_deadly_signal_left_in_the_log_is_the_last_of_it(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("a line\nFatal Python error: Aborted\nold\nFatal Python error: Segmentation fault\nnew\n")
    assert stacks.of_crash(signal.SIGSEGV, log) == "Fatal Python error: Segmentation fault\nnew\n"
    log.write_text(
        "Fatal Python error: Aborted\n\nThread 1:\n  waits\n\nCurrent thread 2:\n  aborts\n\nExtension modules: a\n"
    )
    expected = (
        "Fatal Python error: Aborted\n\nCurrent thread 2:\n  aborts\n\nThread 1:\n  waits\n\nExtension modules: a"
    )
    assert stacks.of_crash(signal.SIGABRT, log) == expected
    assert stacks.of_crash(signal.SIGKILL, log) == ""
    assert stacks.of_crash(None, log) == ""
    assert stacks.of_crash(signal.SIGSEGV, tmp_path / "absent") == ""
