"""Records a writer once and loses the power at every moment of it; what recovers is held against what was promised."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.power_loss.changes import Acknowledge, Change
from tests.faults.power_loss.recorder import Killed, Recorder
from tests.faults.power_loss.replay import (
    Disk,
    Fate,
    after_power_loss,
    bytes_survive,
    everything_survives,
    names_survive,
    nothing_survives,
)

Acknowledged = Callable[[str], None]
SURE_FATES: tuple[Fate, ...] = (nothing_survives, everything_survives, names_survive, bytes_survive)


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Something of ours that writes files, and what must hold of them whenever the power went."""

    name: str
    promise: str
    # Works below the directory and says what is safe. May be begun again after a kill.
    act: Callable[[Path, Acknowledged], None]
    # Recovers with the product's own code; gives what was acknowledged and is lost, or is there and not whole.
    problems: Callable[[Path, frozenset[str]], Iterable[str]]
    # What was there long before.
    prepare: Callable[[Path], None] = lambda _root: None
    # Whether it may be killed in between and begun again in the same process.
    can_be_killed: bool = True


@dataclass(kw_only=True)
class Outcome:
    """What came of a writer."""

    num_states: int = 0
    # States with at least one problem.
    num_broken: int = 0
    num_changes: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A writer's changes from a start on."""

    start: Disk
    changes: tuple[Change, ...]
    num_calls: int


def record(writer: Writer, root: Path, *, kill_at: int | None = None) -> Recording:
    """Lets the writer work; with `kill_at` it is killed at that call of `os` and begun again, as by a new process."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    writer.prepare(root)
    first = Recorder(root, kill_at=kill_at)
    with first:
        start = Disk(names={i: dict(n) for i, n in first.names.items()}, contents=dict(first.contents))
        try:
            writer.act(root, first.acknowledge)
        except Killed:
            first.revive()
            writer.act(root, first.acknowledge)
    return Recording(start=start, changes=tuple(first.changes), num_calls=first.num_calls)


def lose_power(writer: Writer, root: Path, recording: Recording, fates: Iterable[Fate], outcome: Outcome) -> None:
    """After every prefix of the recording, once for each fate; states that were seen with the same acknowledgments are
    not looked at again."""
    seen: set[bytes] = set()
    for fate in fates:
        for end in range(len(recording.changes) + 1):
            told = recording.changes[:end]
            acknowledged = frozenset(change.what for change in told if isinstance(change, Acknowledge))
            disk = after_power_loss(recording.start, told, fate)
            digest = hashlib.blake2b(repr((disk.state(), sorted(acknowledged))).encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            disk.put(root)
            outcome.num_states += 1
            last = type(told[-1]).__name__ if told else "start"
            name = getattr(fate, "__name__", "at_random")
            with _without_syncs():
                found = list(_problems(writer, root, acknowledged))
            outcome.num_broken += bool(found)
            outcome.problems += [
                f"{writer.name}: power lost after change {end} ({last}), {name}: {problem}" for problem in found
            ]
    outcome.num_changes += len(recording.changes)


@contextmanager
def _without_syncs() -> Iterator[None]:
    """What recovery syncs need not be: what it finds is looked at, and deleted."""
    real = os.fsync
    os.fsync = lambda fd: None
    try:
        yield
    finally:
        os.fsync = real


def _problems(writer: Writer, root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    try:
        yield from writer.problems(root, acknowledged)
    except Exception as error:  # noqa: BLE001 - recovery must get through whatever it finds: that it did not is the finding
        yield f"recovery raised {type(error).__name__}: {error}"


def highest_number(acknowledged: frozenset[str], prefix: str) -> int:
    """The highest number that was acknowledged under this prefix; 0 when none was."""
    return max((int(what.partition(":")[2]) for what in acknowledged if what.startswith(f"{prefix}:")), default=0)
