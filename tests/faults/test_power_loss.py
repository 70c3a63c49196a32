"""No moment at which the power goes loses what a writer of ours acknowledged, or leaves half of anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.faults.power_loss.changes import Acknowledge, Enter, Make, Move, Sync, Write
from tests.faults.power_loss.harness import SURE_FATES, Outcome, Recording, lose_power, record
from tests.faults.power_loss.harness import Writer as DiskWriter
from tests.faults.power_loss.recorder import Recorder
from tests.faults.power_loss.replay import (
    Disk,
    after_power_loss,
    at_random,
    everything_survives,
    names_survive,
    nothing_survives,
)
from tests.faults.scenario import Trial
from tests.faults.scenarios.power_loss import WRITERS, run

BY_NAME = {writer.name: writer for writer in WRITERS}
NUM_RANDOM_FATES = 2


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize("name", BY_NAME)
def test_no_moment_loses_what_was_acknowledged(tmp_path: Path, name: str) -> None:
    writer, root, outcome = BY_NAME[name], tmp_path / "root", Outcome()
    fates = [*SURE_FATES, *(at_random(seed) for seed in range(NUM_RANDOM_FATES))]
    lose_power(writer, root, record(writer, root), fates, outcome)
    assert outcome.problems == []
    assert outcome.num_states > 5


@pytest.mark.parametrize("name", [name for name, writer in BY_NAME.items() if writer.can_be_killed])
def test_nor_after_a_process_that_was_killed(tmp_path: Path, name: str) -> None:
    writer, root, outcome = BY_NAME[name], tmp_path / "root", Outcome()
    num_calls = record(writer, root).num_calls
    for kill_at in range(2, num_calls, max(1, num_calls // 5)):
        lose_power(writer, root, record(writer, root, kill_at=kill_at), [nothing_survives], outcome)
    assert outcome.problems == []


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"plans"}))
def test_without_its_fsyncs_every_writer_loses_something(tmp_path: Path, name: str) -> None:
    """Else the replay would prove nothing. A plan that is gone is planned again."""
    writer, root, outcome = BY_NAME[name], tmp_path / "root", Outcome()
    recording = record(writer, root)
    unsynced = tuple(change for change in recording.changes if not isinstance(change, Sync))
    lost = Recording(start=recording.start, changes=unsynced, num_calls=recording.num_calls)
    lose_power(writer, root, lost, [nothing_survives, names_survive], outcome)
    assert outcome.num_broken > 0


def test_a_plan_that_was_not_synced_is_found_to_be_half(tmp_path: Path) -> None:
    writer, root, outcome = BY_NAME["plans"], tmp_path / "root", Outcome()
    recording = record(writer, root)
    unsynced = tuple(change for change in recording.changes if not isinstance(change, Sync))
    lost = Recording(start=recording.start, changes=unsynced, num_calls=recording.num_calls)
    lose_power(writer, root, lost, [names_survive], outcome)
    assert outcome.num_broken > 0


def test_the_scenario_says_how_often_it_held(tmp_path: Path) -> None:
    [finding] = run(Trial(directory=tmp_path, seed=0))
    assert (finding.promise, finding.violations) == (WRITERS[0].promise, ())
    assert finding.tried == finding.held > 5


# The recorder and the replay themselves.


def test_what_native_code_writes_is_recorded_unsynced(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        with (tmp_path / "file").open("wb") as file:
            file.write(b"abc")
        (tmp_path / "file").rename(tmp_path / "other")
        recorder.acknowledge("done")
    assert recorder.changes == [
        Make(1, False),
        Enter(0, "file", 1),
        Write(1, 0, b"abc"),
        Move(0, "file", 0, "other", 1),
        Acknowledge("done"),
    ]


def test_a_replay_keeps_what_was_synced_and_hard_links(tmp_path: Path) -> None:
    changes = (
        Make(1, False),
        Enter(0, "a", 1),
        Write(1, 0, b"whole"),
        Sync(1),
        Enter(0, "b", 1),
        Sync(0),
        Write(1, 5, b" and more"),
        Move(0, "b", 0, "c", 1),
    )
    after_power_loss(Disk(), changes, nothing_survives).put(tmp_path / "nothing")
    assert {path.name: path.read_bytes() for path in (tmp_path / "nothing").iterdir()} == {"a": b"whole", "b": b"whole"}
    assert (tmp_path / "nothing" / "a").samefile(tmp_path / "nothing" / "b")
    after_power_loss(Disk(), changes, everything_survives).put(tmp_path / "everything")
    assert {path.name for path in (tmp_path / "everything").iterdir()} == {"a", "c"}
    assert (tmp_path / "everything" / "c").read_bytes() == b"whole and more"
    after_power_loss(Disk(), changes, names_survive).put(tmp_path / "names")
    assert {path.name: path.read_bytes() for path in (tmp_path / "names").iterdir()} == {"a": b"whole", "c": b"whole"}


def test_a_rename_without_the_bytes_is_found(tmp_path: Path) -> None:
    """The classic mistake: written, renamed, the directory synced, and never the file."""

    def write(root: Path, acknowledge: object) -> None:
        (root / "staged").write_bytes(b"content")
        (root / "staged").rename(root / "file")

    def problems(root: Path, _acknowledged: frozenset[str]) -> list[str]:
        found = root / "file"
        return ["half"] if found.exists() and found.read_bytes() != b"content" else []

    writer, outcome = DiskWriter(name="mistake", promise="R1", act=write, problems=problems), Outcome()
    lose_power(writer, tmp_path / "root", record(writer, tmp_path / "root"), [names_survive], outcome)
    assert outcome.problems
