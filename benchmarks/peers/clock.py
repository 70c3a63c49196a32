"""Times steps between turns: one mark at the end of each optimizer step, on the device's own clock.

The mark is set by torch's hook behind an optimizer's step, the same for every side, and costs no synchronization. The
first step of a turn follows a stand-still and is left out. Without a CUDA device the host's clock is taken, which is
only good to try a script.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.peers import turns
from benchmarks.peers.kernel_profile import KernelProfile

_PROFILED_STEPS = 3
# A step may be handed out before the numbers of the one before it are read.
_READ_LATE = 2
# torch's own annotations of it are incomplete.
_CUDA: Any = torch.cuda


@dataclass(kw_only=True)
class StepClock:
    """Follows one training. `end_training` is called once, in the training thread, when nothing more is wanted."""

    taker: turns.TurnTaker
    end_training: Callable[[], None]
    warmup_steps: int
    turn_steps: int
    # Steps of each turn that are counted, with milliseconds: [[(step, ms), ...], ...]. Steps count from 0.
    intervals: list[list[tuple[int, float]]] = field(default_factory=list)
    # When steps of turns were over on the device, seconds of time.perf_counter. Without the last ones of a turn: their
    # numbers are read when the next turn comes.
    ends: dict[int, float] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    _step: int = 0
    _marks: list[tuple[int, Any]] = field(default_factory=list)
    # A mark where the turn began, and when that was.
    _begun: tuple[Any, float] | None = None
    _wanted: int = 0
    _doing: str = "warm-up"
    _profiler: KernelProfile | None = None

    def __post_init__(self) -> None:
        self._wanted = self.warmup_steps
        self._cuda = torch.cuda.is_available()
        register_optimizer_step_post_hook(lambda *_: self._tick())

    def _tick(self) -> None:
        step = self._step
        self._step += 1
        if self._doing == turns.END:
            return
        self._marks.append((step, self._mark()))
        if len(self._marks) < self._wanted:
            return
        marks, self._marks = self._marks, []
        self._synchronize()
        if self._doing == turns.GO and self._begun is not None:
            self.intervals.append(
                [
                    (number, self._milliseconds(before, after))
                    for (_, before), (number, after) in itertools.pairwise(marks)
                ]
            )
            mark, seconds = self._begun
            for number, after in marks[:-_READ_LATE]:
                self.ends[number] = seconds + self._milliseconds(mark, after) / 1e3
        elif self._doing == turns.PROFILE and self._profiler is not None:
            self.profile = self._profiler.end(_PROFILED_STEPS)
        self._doing = self.taker.tell_and_wait(self._doing)
        if self._doing == turns.END:
            self.end_training()
        elif self._doing == turns.PROFILE:
            self._wanted = _PROFILED_STEPS
            self._profiler = KernelProfile()
        else:
            self._wanted = self.turn_steps + 1
            mark = self._mark()
            self._synchronize()
            self._begun = mark, time.perf_counter()

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = _CUDA.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, before: Any, after: Any) -> float:
        return float(before.elapsed_time(after)) if self._cuda else 1e3 * (after - before)

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def peak_allocated_bytes() -> int:
    """Most that was allocated on the device since the peak was last reset; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
