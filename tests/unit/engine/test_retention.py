"""Which checkpoints stay, in which order the others go, and what a crash between two leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpu_service.engine.training.retention import committed, prune


def _commit(directory: Path, step: int, *, best: bool = False) -> None:
    path = directory / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"step": step, "best": best, "files": []}))


def _steps(directory: Path) -> list[int]:
    return [kept.step for kept in committed(directory)]


@pytest.mark.parametrize(
    ("best", "keep", "keep_best", "left"),
    [
        ([], 2, True, [40, 50]),
        ([], 1, True, [50]),
        ([20], 2, True, [20, 40, 50]),
        ([20], 2, False, [40, 50]),
        # Each was the lowest when it was written.
        ([10, 20, 30], 2, True, [30, 40, 50]),
        ([40], 2, True, [40, 50]),
        ([50], 1, True, [50]),
        ([10], 9, True, [10, 20, 30, 40, 50]),
        # The newest is never deleted.
        ([10], 0, False, [50]),
    ],
)
def test_newest_and_best_stay(
    tmp_path: Path, best: Sequence[int], keep: int, keep_best: bool, left: Sequence[int]
) -> None:
    for step in (10, 20, 30, 40, 50):
        _commit(tmp_path, step, best=step in best)

    deleted = prune(tmp_path, keep=keep, keep_best=keep_best)

    assert _steps(tmp_path) == left
    # Oldest first.
    assert [one.step for one in deleted] == [step for step in (10, 20, 30, 40, 50) if step not in left]


@pytest.mark.parametrize("manifest", [b"{", b"", b"[]", b"null", b"\xff{}", b'{"step": null, "best": true}'])
def test_what_is_no_committed_checkpoint_counts_for_nothing(tmp_path: Path, manifest: bytes) -> None:
    _commit(tmp_path, 10)
    (tmp_path / ".staging-step-00000020").mkdir()
    (tmp_path / "step-00000030").mkdir()
    _commit(tmp_path, 40)
    (tmp_path / "step-00000040/manifest.json").write_bytes(manifest)

    assert prune(tmp_path, keep=1, keep_best=True) == []
    assert _steps(tmp_path) == [10]


def test_a_crash_between_two_deletions_leaves_the_newer(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        _commit(tmp_path, step, best=step == 20)
    # The third deletion meets something that it cannot get past.
    obstacle = tmp_path / ".deleting-step-00000030"
    obstacle.write_text("")
    with pytest.raises(NotADirectoryError):
        prune(tmp_path, keep=1, keep_best=True)
    assert _steps(tmp_path) == [20, 30, 40]
    obstacle.unlink()

    # A process that died in the middle of a deletion leaves what it had put aside.
    half = tmp_path / ".deleting-step-00000010"
    half.mkdir()
    (half / "weights.safetensors").write_text("half")
    assert [one.step for one in prune(tmp_path, keep=1, keep_best=True)] == [30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000040"]
