"""Step times come out of a journal, and cores that a run has to itself are whole ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_service.journal import Writer, events
from tests.faults import step_times
from tests.faults.step_times import StepTimes, slower_by, split_cores
from tunesmith.common.v1 import event_pb2


def _machine(monkeypatch: pytest.MonkeyPatch, cores: list[set[int]]) -> None:
    every = set().union(*cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: every)
    monkeypatch.setattr(step_times, "_siblings", lambda cpu: frozenset(next(core for core in cores if cpu in core)))


@pytest.mark.parametrize(
    ("cores", "num_own", "expected"),
    [
        ([{0}, {1}, {2}, {3}], 2, ([{0}, {1}], {2, 3})),
        ([{0, 2}, {1, 3}], 1, ([{0, 2}], {1, 3})),
        ([{0}, {1}], 1, ([{0}], {1})),
        # Nothing would be left for everybody else.
        ([{0, 2}, {1, 3}], 2, None),
        ([{0}], 1, None),
    ],
)
def test_a_run_has_whole_cores_of_its_own(
    cores: list[set[int]], num_own: int, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, cores)
    assert split_cores(num_own) == expected


def test_this_machines_cores_are_told_by_the_kernel() -> None:
    for cpu in os.sched_getaffinity(0):
        assert cpu in step_times._siblings(cpu)


def test_steps_are_read_once_and_timed_between(tmp_path: Path) -> None:
    times = StepTimes(tmp_path)
    with Writer.open(tmp_path / "journal", 1) as writer:
        for number in (1, 2):
            writer.append(events.wrap(event_pb2.StepEvent(step=number)))
        writer.append(events.wrap(event_pb2.PhaseEvent(phase=event_pb2.PHASE_SAVING)))
        assert times.look() == 2
        writer.append(events.wrap(event_pb2.StepEvent(step=3)))
        assert times.look() == 3
    told = times._told
    assert len(times.between(told[0], told[2])) == 2
    assert times.between(told[1], told[2]) == [told[2] - told[1]]
    assert times.between(told[2], told[2] + 1) == []
    with pytest.raises(AssertionError, match="3 of 4 steps"):
        times.wait_for(1, seconds=0)


def test_medians_are_compared() -> None:
    assert slower_by([1.0, 2.0, 3.0], [2.2, 0.0, 100.0]) == pytest.approx(0.1)
    assert slower_by([2.0], [1.0]) == -0.5


def test_a_process_keeps_to_its_cores_for_a_while() -> None:
    before = os.sched_getaffinity(0)
    with step_times.keeping_to({min(before)}):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
