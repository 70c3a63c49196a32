"""Keeps blobs and what planners and engines left within a number of bytes: what was not used for the longest time goes.

Everything here can be had again: control pushes blobs that a node lacks, planners make plans and tokens anew, and
engines digests and copies of weights.
Refuses to touch what a run that is not over may read. All functions block.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_service.domain.planned_data import DATA_FILE, PLAN_FILE
from gpu_service.runs.node_files import NodeFiles
from gpu_service.shim import durable_json

# A blob that was just pushed, or just found to be here, waits for the call that needs it.
_FRESH_SECONDS = 600.0
# An unfinished write that nobody went on with for this long is given up.
_ABANDONED_SECONDS = 24 * 3600.0
# A copy of a base takes seconds to write; whoever began it this long ago is dead.
_ABANDONED_COPY_SECONDS = 3600.0
_STAGING_PREFIX = ".staging-"
# Of a base's weights: digests of pieces, and copies in 4 bits. Engines make them, and read them as a run begins.
_WEIGHTS = ("weights", "prequantized")


@dataclass(frozen=True, kw_only=True, slots=True)
class Protected:
    """What must stay."""

    # Digests of what runs that are not over name: their datasets, and what an earlier job left.
    blobs: Collection[str]
    # Digests of the specs of these runs, as plans carry them.
    spec_digests: Collection[str]
    # False while a planner may be at work: it may use any tokens or plan that is there.
    planners_rest: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A file or directory that goes or stays as a whole."""

    path: Path
    used: float
    num_bytes: int
    may_go: bool


def make_room(files: NodeFiles, max_bytes: int, protected: Protected, *, kept_share: float = 1.0) -> list[Path]:
    """Move what has to go into the trash, and give where it lies now; the caller deletes it. Raises OSError.

    At most `kept_share` of the bytes that are there stay, as far as they may go.
    """
    now = time.time()
    entries = [*_blobs(files, protected, now), *_planned(files, protected, now), *_weights(files, now)]
    doomed = list(_abandoned(files, protected, now))
    num_bytes = sum(entry.num_bytes for entry in entries)
    excess = num_bytes - min(max_bytes, int(kept_share * num_bytes))
    for entry in sorted(entries, key=lambda entry: entry.used):
        if excess <= 0:
            break
        if entry.may_go:
            doomed.append(entry.path)
            excess -= entry.num_bytes
    return [moved for path in doomed if (moved := _discard(files.trash, path)) is not None]


def delete(doomed: Sequence[Path]) -> int:
    """Delete what `make_room` gave; gives its bytes. What cannot be deleted goes with the next start's trash."""
    freed = 0
    for path in doomed:
        num_bytes = _measure(path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        freed += 0 if path.exists() else num_bytes
    return freed


def _blobs(files: NodeFiles, protected: Protected, now: float) -> Iterator[_Entry]:
    for path in files.blobs.glob("??/*"):
        wanted = path.name in protected.blobs
        if wanted:
            _note_use(path, now)
        used = _last_use(path)
        if used is not None:
            yield _Entry(
                path=path, used=used, num_bytes=_measure(path), may_go=not wanted and used < now - _FRESH_SECONDS
            )


def _planned(files: NodeFiles, protected: Protected, now: float) -> Iterator[_Entry]:
    """Plans, the tokens that they refer to, indices of rows, and kept tokenizers."""
    kept: set[Path] = set()
    for plan in _whole(files.cache / "plans"):
        if _spec_digest(plan) in protected.spec_digests:
            kept |= {plan, *_shards_of(plan)}
    for parent in ("plans", "tokens", "rows", "tokenizers"):
        for path in _whole(files.cache / parent):
            wanted = path in kept
            if wanted:
                _note_use(path, now)
            used = _last_use(path)
            if used is not None:
                may_go = protected.planners_rest and not wanted
                yield _Entry(path=path, used=used, num_bytes=_measure(path), may_go=may_go)


def _weights(files: NodeFiles, now: float) -> Iterator[_Entry]:
    for parent in _WEIGHTS:
        for path in _whole(files.cache / parent):
            used = _last_use(path)
            if used is not None:
                # Who has it open reads on when it goes; who has just looked for it is about to open it.
                yield _Entry(path=path, used=used, num_bytes=_measure(path), may_go=used < now - _FRESH_SECONDS)


def _abandoned(files: NodeFiles, protected: Protected, now: float) -> Iterator[Path]:
    """What no process will ever finish."""
    for path in files.blobs.glob("partial/*"):
        used = _last_use(path)
        if used is not None and used < now - _ABANDONED_SECONDS:
            yield path
    for path in files.cache.glob(f"*/{_STAGING_PREFIX}*"):
        if path.parent.name in _WEIGHTS:
            used = _last_use(path)
            if used is not None and used < now - _ABANDONED_COPY_SECONDS:
                yield path
        elif protected.planners_rest:
            yield path


def _whole(parent: Path) -> list[Path]:
    return [path for path in parent.glob("*") if not path.name.startswith(_STAGING_PREFIX)]


def _spec_digest(plan: Path) -> str:
    return str(_read(plan / PLAN_FILE).get("spec_digest", ""))


def _shards_of(plan: Path) -> Iterator[Path]:
    for source in _read(plan / DATA_FILE).get("sources", ()):
        yield Path(os.path.normpath(plan / source["shard"]))


def _read(path: Path) -> dict[str, Any]:
    try:
        return durable_json.read(path) or {}
    except ValueError:
        # A damaged plan: planners replace it, and no run can read it.
        return {}


def _last_use(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _note_use(path: Path, now: float) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, (now, now))


def _measure(path: Path) -> int:
    """Bytes on the disk, of a file or of everything below a directory."""
    found = (path, *path.rglob("*")) if path.is_dir() else (path,)
    total = 0
    for item in found:
        with contextlib.suppress(FileNotFoundError):
            total += item.lstat().st_blocks * 512
    return total


def _discard(trash: Path, path: Path) -> Path | None:
    target = trash / f"cache-{secrets.token_hex(8)}"
    try:
        return path.rename(target)
    except FileNotFoundError:
        return None
