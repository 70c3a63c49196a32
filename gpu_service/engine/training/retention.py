"""Which committed checkpoints of a run stay on its disk: the newest ones, and the best by held-out loss."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from gpu_service.engine import durable


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A committed checkpoint as its manifest tells of it."""

    name: str
    step: int
    path: Path
    best: bool


def committed(directory: Path) -> list[Kept]:
    """Committed checkpoints below `directory`, oldest step first.

    What is being staged or deleted is none, nor what has no manifest that can be read: it counts for nothing and stays.
    """
    found = []
    for path in directory.glob(f"step-*/{durable.MANIFEST_FILE}"):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            step, best = int(manifest["step"]), bool(manifest["best"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(Kept(name=path.parent.name, step=step, path=path.parent, best=best))
    return sorted(found, key=lambda kept: kept.step)


def choose_doomed(kept: list[Kept], *, keep: int, keep_best: bool) -> list[Kept]:
    """Those to delete, oldest first: all but the newest `keep` (at least one) and, with `keep_best`, the best.

    A checkpoint is best when no earlier one had a lower held-out loss, so the newest of those is the best of all.
    """
    newest = kept[-max(keep, 1) :]
    best = [one for one in kept if one.best][-1:] if keep_best else []
    return [one for one in kept if one not in newest and one not in best]


def prune(directory: Path, *, keep: int, keep_best: bool) -> list[Kept]:
    """Delete what `choose_doomed` names, oldest first, so that a crash between two leaves the newer; gives the deleted.

    Called once the newest is committed, which is never among them. What an earlier process had begun to delete goes
    too.
    """
    doomed = choose_doomed(committed(directory), keep=keep, keep_best=keep_best)
    for one in doomed:
        durable.delete(one.path)
    for left_over in durable.half_deleted(directory):
        shutil.rmtree(left_over)
    return doomed
