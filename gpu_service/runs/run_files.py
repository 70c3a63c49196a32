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

from gpu_service.domain.errors import Fault, Refusal, refuse_user
from gpu_service.domain.spec import StartFrom
from gpu_service.shim import durable_json

_MANIFEST = "manifest.json"
_CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReference:
    """A file by content; `path` is relative with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeRequest:
    """A checkpoint to go on from: of an earlier attempt on this node, or, with `files`, out of the blob store."""

    checkpoint: str
    step: int
    attempt: int
    files: Sequence[FileReference]


def find_file(run_directories: Iterable[Path], sha256: str) -> Path | None:
    """A file of a run's artifacts or committed checkpoints with this content, or None."""
    for directory in run_directories:
        for path, digest in _listed_files(directory):
            if digest == sha256 and path.is_file():
                return path
    return None


def _listed_files(directory: Path) -> Iterator[tuple[Path, str]]:
    artifacts = durable_json.read(directory / "artifacts" / _MANIFEST) or {"artifacts": []}
    for artifact in artifacts["artifacts"]:
        root = _inside(directory / "artifacts", artifact["name"])
        for file in artifact["files"]:
            yield _inside(root, file["path"]), file["sha256"]
    for path in directory.glob(f"checkpoints/*/{_MANIFEST}"):
        # Hidden directories are still being staged.
        if path.parent.name.startswith("."):
            continue
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            # Released or pruned since it was listed.
            continue
        yield path, hashlib.sha256(raw).hexdigest()
        for file in _read_manifest(path)["files"]:
            yield _inside(path.parent, file["path"]), file["sha256"]


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = durable_json.read(path)
    except ValueError as error:
        raise _mismatch(f"{path.name} of checkpoint {path.parent.name} is not JSON: {error}") from error
    return manifest or {"files": []}


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
    sources = (
        _from_blobs(request, blob_path)
        if request.files
        else _from_attempt(job_directory / str(request.attempt) / "checkpoints" / request.checkpoint)
    )
    directory = target / request.checkpoint
    for relative, source in sources:
        path = _inside(directory, relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        _link(source, path)
    return {"checkpoint_directory": str(directory), "checkpoint": request.checkpoint, "step": request.step}


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
    if _MANIFEST not in {file.path for file in request.files}:
        raise _mismatch(f"checkpoint {request.checkpoint} comes without its {_MANIFEST}")
    sources = [(file.path, blob_path(file.sha256)) for file in request.files]
    missing = [path.name for _, path in sources if not path.exists()]
    if missing:
        raise blob_not_found(missing)
    return sources


def _from_attempt(directory: Path) -> list[tuple[str, Path]]:
    if not (directory / _MANIFEST).exists():
        raise Refusal(
            "CHECKPOINT_NOT_FOUND", Fault.PLATFORM, f"no checkpoint {directory.name} is here", field="resume_from"
        )
    names = [str(file["path"]) for file in _read_manifest(directory / _MANIFEST)["files"]]
    sources = [(name, _inside(directory, name)) for name in (*names, _MANIFEST)]
    for name, path in sources:
        if not path.is_file():
            raise _mismatch(f"{name} of checkpoint {directory.name} is gone")
    return sources


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
