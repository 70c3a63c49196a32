"""The learning rate of every step, by hand."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service.engine.training.schedule import SHAPES, Schedule


def _rates(name: str, warmup_steps: int, num_steps: int) -> list[float]:
    schedule = Schedule(name=name, peak=1.0, warmup_steps=warmup_steps, num_steps=num_steps)
    return [schedule.learning_rate(step) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.5 + math.sqrt(2) / 4, 1 / 2, 0.5 - math.sqrt(2) / 4]),
    ],
)
def test_rates(name: str, expected: list[float]) -> None:
    assert _rates(name, 2, 6) == pytest.approx(expected)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert [_rates(name, 0, 3)[0] for name in SHAPES] == [1.0, 1.0, 1.0]


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 50), st.integers(1, 50))
def test_never_zero_and_never_above_the_peak(name: str, warmup_steps: int, num_steps: int) -> None:
    assert all(0 < rate <= 1 for rate in _rates(name, warmup_steps, num_steps))


def test_what_waits_for_runs_needs_no_torch() -> None:
    """A stop is heard while torch is still being imported, so what hears it must not import torch."""
    modules = ("control", "entrypoint", "planning", "reporter", "request", "stopping", "training.schedule")
    lines = [f"import gpu_service.engine.{name}" for name in modules]
    script = "; ".join(["import sys", *lines, "sys.exit('torch' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", script], env=os.environ, timeout=60).returncode == 0
