"""Finds the files that runs left, by content, and readies what a run goes on from or starts from.

Reads the manifests that engines write, and refuses a path in one that leaves its directory. All functions block.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import structlog

from gpu_service.domain.errors import Fault, Refusal, refuse_user
from gpu_service.domain.spec import StartFrom
from gpu_service.runs.manifests import (
    MANIFEST,
    DamagedManifest,
    FileReference,
    parse_artifacts,
    parse_checkpoint,
    parse_trainer,
    read,
    set_aside,
)

_log = structlog.get_logger(__name__)
_CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeRequest:
    """A checkpoint to go on from: of an earlier attempt on this node, or, with `files`, out of the blob store."""

    checkpoint: str
    step: int
    attempt: int
    files: Sequence[FileReference]


def find_file(run_directories: Iterable[Path], sha256: str) -> Path | None:
    """A file of a run's artifacts or committed checkpoints with this content, or None.

    What is damaged is passed over: it must not keep the content of others from being found. Raises `Refusal`
    PATH_NOT_ALLOWED.
    """
    for directory in run_directories:
        for path, file in _listed_files(directory):
            if file.sha256 == sha256 and _has_size(path, file.size_bytes):
                return path
    return None


def _listed_files(directory: Path) -> Iterator[tuple[Path, FileReference]]:
    path = directory / "artifacts" / MANIFEST
    try:
        artifacts = parse_artifacts(read(path))
    except FileNotFoundError:
        artifacts = []
    except DamagedManifest as error:
        _log.error("artifacts-damaged", directory=str(path.parent), problem=str(error))
        artifacts = []
    for name, files in artifacts:
        root = _inside(directory / "artifacts", name)
        for file in files:
            yield _inside(root, file.path), file
    for path in directory.glob(f"checkpoints/*/{MANIFEST}"):
        # Hidden directories are still being staged, or were set aside.
        if path.parent.name.startswith("."):
            continue
        try:
            raw = read(path)
            files = parse_checkpoint(raw)
        except FileNotFoundError:
            # Released or pruned since it was listed.
            continue
        except DamagedManifest as error:
            _set_aside(path.parent, str(error))
            continue
        yield path, FileReference(path=MANIFEST, sha256=hashlib.sha256(raw).hexdigest(), size_bytes=len(raw))
        for file in files:
            yield _inside(path.parent, file.path), file


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size_bytes
    except OSError:
        return False


def _set_aside(checkpoint: Path, problem: str) -> None:
    try:
        set_aside(checkpoint, problem)
    except OSError as error:
        # It keeps its name, and is found damaged again by whoever reads it.
        _log.error("checkpoint-not-set-aside", checkpoint=checkpoint.name, error=str(error))


def _inside(root: Path, relative: str) -> Path:
    parts = PurePosixPath(relative)
    if parts.is_absolute() or not parts.parts or ".." in parts.parts:
        raise refuse_user("PATH_NOT_ALLOWED", f"{relative!r} leaves its directory", field="files.path")
    return root.joinpath(*parts.parts)


def prepare_resume(
    request: ResumeRequest, *, job_directory: Path, target: Path, blob_path: Callable[[str], Path]
) -> dict[str, Any]:
    """Put the checkpoint's files into `target` by hard link, so that nobody else can delete them; gives the `resume` of
    `run.json`.

    Raises `Refusal` CHECKPOINT_NOT_FOUND, BLOB_NOT_FOUND, RESUME_MISMATCH, PATH_NOT_ALLOWED, INVALID_FIELD.
    """
    if not _CHECKPOINT_NAME.fullmatch(request.checkpoint):
        raise refuse_user("INVALID_FIELD", "checkpoint is not a name", field="resume_from.checkpoint")
    written = None if request.files else job_directory / str(request.attempt) / "checkpoints" / request.checkpoint
    sources = _from_blobs(request, blob_path) if written is None else _from_attempt(written)
    directory = target / request.checkpoint
    for relative, source in sources:
        path = _inside(directory, relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        _link(source, path)
    return {
        "checkpoint_directory": str(directory),
        "checkpoint": request.checkpoint,
        "step": request.step,
        "source_directory": "" if written is None else str(written),
    }


def read_trainer(request: ResumeRequest | None, *, job_directory: Path, blob_path: Callable[[str], Path]) -> str:
    """What trained the steps of the checkpoint that a run goes on from, as planning is told; empty where it begins.

    Empty too where the manifest cannot be had: `prepare_resume` says what is wrong with it.
    """
    if request is None or not _CHECKPOINT_NAME.fullmatch(request.checkpoint):
        return ""
    written = job_directory / str(request.attempt) / "checkpoints" / request.checkpoint / MANIFEST
    manifests = [blob_path(file.sha256) for file in request.files if file.path == MANIFEST]
    if request.files and not manifests:
        return ""
    try:
        return parse_trainer(read(manifests[0] if manifests else written))
    except (OSError, DamagedManifest):
        return ""


def prepare_start(start: StartFrom | None, *, target: Path, blob_path: Callable[[str], Path]) -> dict[str, Any] | None:
    """Put what an earlier job left into `target` by hard link, as a checkpoint's files are; gives `start_from` of
    `run.json`, None when the run starts from its base.

    Raises `Refusal` BLOB_NOT_FOUND, PATH_NOT_ALLOWED, INVALID_FIELD.
    """
    if start is None:
        return None
    if not _CHECKPOINT_NAME.fullmatch(start.name) or not start.files:
        raise refuse_user("INVALID_FIELD", "start_from names nothing", field="spec.start_from")
    sources = [(file.path, blob_path(file.sha256)) for file in start.files]
    missing = [source.name for _, source in sources if not source.exists()]
    if missing:
        raise blob_not_found(missing)
    for relative, source in sources:
        path = _inside(target, relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        _link(source, path)
    return {"directory": str(target), "name": start.name}


def _from_blobs(request: ResumeRequest, blob_path: Callable[[str], Path]) -> list[tuple[str, Path]]:
    if MANIFEST not in {file.path for file in request.files}:
        raise _mismatch(f"checkpoint {request.checkpoint} comes without its {MANIFEST}")
    sources = [(file.path, blob_path(file.sha256)) for file in request.files]
    missing = [path.name for _, path in sources if not path.exists()]
    if missing:
        raise blob_not_found(missing)
    return sources


def _from_attempt(directory: Path) -> list[tuple[str, Path]]:
    """What is not whole at a glance is set aside; what its files hold, the engine compares."""
    try:
        files = parse_checkpoint(read(directory / MANIFEST))
        sources = [(file.path, _inside(directory, file.path)) for file in files]
        for file, (_, path) in zip(files, sources, strict=True):
            if not _has_size(path, file.size_bytes):
                raise DamagedManifest(f"{file.path} is not there with its {file.size_bytes} bytes")
    except FileNotFoundError:
        raise Refusal(
            "CHECKPOINT_NOT_FOUND", Fault.PLATFORM, f"no checkpoint {directory.name} is here", field="resume_from"
        ) from None
    except DamagedManifest as error:
        _set_aside(directory, str(error))
        raise _mismatch(f"checkpoint {directory.name} is damaged: {error}") from error
    return [*sources, (MANIFEST, directory / MANIFEST)]


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def blob_not_found(digests: Sequence[str]) -> Refusal:
    """The refusal of content that is not here; lists at most 100."""
    return Refusal(
        "BLOB_NOT_FOUND",
        Fault.PLATFORM,
        f"{len(digests)} blobs are not on this node",
        details={"sha256": ",".join(digests[:100])},
    )


def _mismatch(message: str) -> Refusal:
    return Refusal("RESUME_MISMATCH", Fault.PLATFORM, message, field="resume_from")


def remove_tree(directory: Path) -> int:
    """Delete a directory; gives the bytes that the disk got back. A file with further links gives nothing."""
    freed = 0
    for root, _, names in os.walk(directory):
        for name in names:
            status = (Path(root) / name).lstat()
            freed += status.st_blocks * 512 if status.st_nlink == 1 else 0
    shutil.rmtree(directory)
    return freed
