"""How long a run's steps take by its engine's clock, and processor cores that a run has to itself. Judges nothing.

Who shares a core with whom is the machine's doing, not the services': a run whose steps are compared has a core of its
own, and everything else the others.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from gpu_service.journal import Reader
from tunesmith.common.v1 import event_pb2

_LOOK_SECONDS = 0.2


def split_cores(num_own: int) -> tuple[list[frozenset[int]], frozenset[int]] | None:
    """So many physical cores, as the sets of their logical ones, and the logical ones of all others; None where nothing
    would be left for the others.
    """
    allowed = os.sched_getaffinity(0)
    cores = sorted({_siblings(cpu) & allowed for cpu in allowed}, key=min)
    own, others = cores[:num_own], cores[num_own:]
    if not others:
        return None
    return own, frozenset().union(*others)


def _siblings(cpu: int) -> frozenset[int]:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    found: set[int] = set()
    try:
        parts = path.read_text().strip().split(",")
    except OSError:
        return frozenset({cpu})
    for part in parts:
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found | {cpu})


def pin(pid: int, cpus: Collection[int]) -> None:
    """Every thread of a process runs on these from now on; what they start, too. Raises OSError."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cpus)


@contextmanager
def keeping_to(cpus: Collection[int]) -> Iterator[None]:
    """This process, and what it starts inside, runs on these. Raises OSError."""
    before = os.sched_getaffinity(0)
    pin(os.getpid(), cpus)
    try:
        yield
    finally:
        pin(os.getpid(), before)


class StepTimes:
    """The steps of one run, out of its journal."""

    def __init__(self, run_directory: Path) -> None:
        self._journal = run_directory / "journal"
        self._sequence = 0
        # Seconds since the epoch at which each step was told, by the engine.
        self._told: list[float] = []

    def look(self) -> int:
        """Reads what is new; gives the number of steps so far."""
        with Reader(self._journal) as reader:
            while records := reader.read(self._sequence, limit=4096):
                self._sequence = records[-1].run_sequence
                for event in (record.decode() for record in records):
                    if event.kind == event_pb2.EVENT_KIND_STEP:
                        self._told.append(event.time.ToNanoseconds() / 1e9)
        return len(self._told)

    def wait_for(self, num_steps: int, *, seconds: float, until: Callable[[], object] = lambda: True) -> None:
        """Until so many more steps were told, and `until` is true. AssertionError when that takes longer."""
        wanted, ends_at = self.look() + num_steps, time.monotonic() + seconds
        while self.look() < wanted or not until():
            assert time.monotonic() < ends_at, f"{self.look()} of {wanted} steps within {seconds:.0f} s"
            time.sleep(_LOOK_SECONDS)

    def between(self, start: float, end: float) -> list[float]:
        """Seconds of each step that began and ended between these times."""
        return [after - before for before, after in pairwise(self._told) if start <= before and after <= end]


def slower_by(before: list[float], during: list[float]) -> float:
    """By what part the median step of `during` takes longer than that of `before`; negative: less long."""
    return statistics.median(during) / statistics.median(before) - 1
