"""What a fault scenario is: a trial that breaks something on purpose, and what it found of each promise.

The runner (`python -m tests.faults`) repeats a scenario's trials to its full count in shards; tests run a few of them.
Refuses to judge by itself: a finding says how often a promise was tried and how often it held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One go at a scenario."""

    # Empty; everything that the trial writes lies below it.
    directory: Path
    # Decides everything that is random in it.
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a trial says of one promise."""

    # `R1` to `R33`, as docs/operations.md numbers them.
    promise: str
    tried: int
    # `tried` unless there are violations.
    held: int
    # One sentence each; a trial that could not do what it was to try raises instead.
    violations: tuple[str, ...] = ()
    # The worst figure measured, where the promise has one: `what` it is, its value and unit (`s`, `MiB`, `events`).
    worst: float | None = None
    unit: str = ""
    what: str = ""
    # Why the machine could not try it; then nothing was tried, and the report counts that.
    skipped: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A kind of fault and the promises that it tries."""

    name: str
    promises: tuple[str, ...]
    # Trials of `make faults` over all shards.
    num_trials: int
    # About what one takes on two cores; the runner divides shards by it.
    trial_seconds: float
    # Raises AssertionError or whatever the product raised when the trial could not be carried out.
    run: Callable[[Trial], list[Finding]]
    # Whether the engine trains a real model (torch on the CPU); needed to be counted among the real kills.
    real_engine: bool = False
    # Whether its figures are times that other trials beside it would spoil: it has the machine to itself.
    alone: bool = False
