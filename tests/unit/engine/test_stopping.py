"""Stops: which one wins, and what becomes of a child that is being waited for."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from gpu_service.engine.stopping import StopMode, StopRequested, StopSwitch


def _sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "600"], process_group=0)


def test_nothing_was_asked_for() -> None:
    switch = StopSwitch()
    switch.check()
    assert switch.mode is None


@pytest.mark.parametrize(("first", "second"), list(itertools.product(StopMode, StopMode)))
def test_cancel_outranks_checkpoint(first: StopMode, second: StopMode) -> None:
    switch = StopSwitch()
    switch.request(first)
    switch.request(second)
    with pytest.raises(StopRequested) as caught:
        switch.check()
    assert caught.value.mode is (StopMode.CANCEL if StopMode.CANCEL in (first, second) else StopMode.CHECKPOINT)


def test_a_stop_kills_the_child() -> None:
    switch = StopSwitch()
    child = _sleeper()
    with switch.owning(child):
        switch.request(StopMode.CANCEL)
        assert child.wait(timeout=30) == -9


def test_a_stop_that_came_first_kills_the_child_too() -> None:
    switch = StopSwitch()
    switch.request(StopMode.CHECKPOINT)
    child = _sleeper()
    with switch.owning(child):
        assert child.wait(timeout=30) == -9


def test_the_child_does_not_outlive_an_exception() -> None:
    child = _sleeper()
    with pytest.raises(RuntimeError), StopSwitch().owning(child):
        raise RuntimeError
    assert child.returncode == -9
