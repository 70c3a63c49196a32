"""Where things lie in a node's data directory, and the node's own durable facts in `node.json`.

Refuses names that are not ids: every path is made here, from parts that were checked. All functions block.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from gpu_service.domain.errors import refuse_user
from gpu_service.journal.failpoints import failpoint
from gpu_service.shim import durable_json
from gpu_service.shim.lock import is_held

_log = structlog.get_logger(__name__)
_JOB_ID = re.compile(r"[0-9A-Za-z]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Directories below `requests` that an engine reads.
GENERATION_PREFIX = "generate-"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunKey:
    """Which attempt at which job, for whom."""

    installation_id: str
    job_id: str
    attempt: int

    @property
    def id(self) -> str:
        return f"{self.job_id}/{self.attempt}"

    def check(self) -> None:
        """Raises `Refusal` INVALID_FIELD."""
        if not self.installation_id or len(self.installation_id) > 128:
            raise refuse_user("INVALID_FIELD", "installation_id is missing", field="key.installation_id")
        if not _JOB_ID.fullmatch(self.job_id):
            raise refuse_user("INVALID_FIELD", "job_id is not an id", field="key.job_id")
        if self.attempt < 1:
            raise refuse_user("INVALID_FIELD", "attempts count from 1", field="key.attempt")


def check_sha256(value: str, *, field: str = "sha256") -> str:
    """Raises `Refusal` INVALID_FIELD unless it is 64 lower-case hex digits."""
    if not _SHA256.fullmatch(value):
        raise refuse_user("INVALID_FIELD", f"{field} is not 64 lower-case hex digits", field=field)
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """What a node must remember whatever happens."""

    name: str
    installation_id: str = ""
    # Highest attempt ever accepted, by job; released jobs stay.
    highest_attempts: dict[str, int] = field(default_factory=dict)

    def with_attempt(self, key: RunKey) -> NodeFacts:
        """The facts once this attempt is accepted."""
        return replace(
            self,
            installation_id=key.installation_id,
            highest_attempts={**self.highest_attempts, key.job_id: key.attempt},
        )


class NodeFiles:
    """Paths of one data directory."""

    def __init__(self, data_directory: Path, models_directory: Path) -> None:
        self.root = data_directory
        self.models = models_directory
        self.blobs = data_directory / "blobs"
        self.cache = data_directory / "cache"
        self.engines = data_directory / "engines"
        self.runs = data_directory / "runs"
        # Requests of planners and probes; nothing in it outlives a call.
        self.requests = data_directory / "requests"
        # Compiled kernels, of engines.
        self.kernels = data_directory / "kernels"
        # What was measured of estimates.
        self.memory_records = data_directory / "memory.json"
        # Released runs on their way out.
        self.trash = data_directory / "trash"

    def prepare(self) -> None:
        """Make the directories and clear what a crash left of things that outlive no process. Raises OSError."""
        for directory in (self.blobs, self.cache / "plans", self.engines, self.runs):
            durable_json.make_directory(directory)
        # What is found is answered for, or deleted, from now on; a server that was killed may not have synced it.
        for directory in (self.trash, *self.runs.glob("*/*"), *self.runs.glob("*"), self.runs):
            if directory.is_dir():
                durable_json.sync_directory(directory)
        self._clear_requests()
        shutil.rmtree(self.trash, ignore_errors=True)
        self.trash.mkdir(parents=True, exist_ok=True)
        for directory in self.runs.glob("*/*"):
            if not (directory / "run.json").exists():
                # Never accepted: a crash left it, perhaps with links that keep a checkpoint's bytes on the disk.
                self._remove(directory)

    def _clear_requests(self) -> None:
        """An engine that outlived its server may be reading what it was asked; the rest ended with their server."""
        reads = any(is_held(directory / "shim.lock") for directory in self.engines.glob("*"))
        self.requests.mkdir(parents=True, exist_ok=True)
        for path in self.requests.iterdir():
            if reads and path.name.startswith(GENERATION_PREFIX):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def run_directory(self, key: RunKey) -> Path:
        return self.runs / key.job_id / str(key.attempt)

    def read_facts(self, name: str) -> NodeFacts:
        """The node's facts; fresh ones on a new directory. Raises OSError, ValueError for a file that is not ours."""
        content = durable_json.read(self.root / "node.json")
        if content is None:
            return NodeFacts(name=name)
        return NodeFacts(
            name=name,
            installation_id=str(content["installation_id"]),
            highest_attempts={str(job_id): int(attempt) for job_id, attempt in content["highest_attempts"].items()},
        )

    def write_facts(self, facts: NodeFacts) -> None:
        durable_json.write(
            self.root / "node.json",
            {
                "name": facts.name,
                "installation_id": facts.installation_id,
                "highest_attempts": facts.highest_attempts,
            },
        )

    def write_run(self, key: RunKey, content: dict[str, Any]) -> Path:
        """Make the run's directory with its `run.json`, durable when this returns. Raises OSError."""
        directory = self.run_directory(key)
        directory.mkdir(parents=True, exist_ok=True)
        # What the run goes on from is linked there already.
        durable_json.sync_tree(directory)
        durable_json.write(directory / "run.json", content)
        durable_json.sync_directory(directory.parent)
        durable_json.sync_directory(self.runs)
        return directory

    def discard_run(self, key: RunKey) -> Path:
        """Move a run out of the way, whole: a crash never leaves half of one. Gives where to. Raises OSError."""
        # A name that is never used twice: what could not be deleted at once must not be in the way later.
        doomed = self.trash / f"{key.job_id}-{key.attempt}-{secrets.token_hex(4)}"
        directory = self.run_directory(key)
        failpoint("discard.before-rename")
        directory.rename(doomed)
        # Before anything of it is deleted: half of a run that is there again would be begun again.
        durable_json.sync_directory(self.trash)
        durable_json.sync_directory(directory.parent)
        failpoint("discard.after-rename")
        with contextlib.suppress(OSError):
            # Stays while the job has other attempts here.
            directory.parent.rmdir()
        return doomed

    def forget_unaccepted(self, key: RunKey) -> None:
        """Delete what there is of a run that was not accepted after all. Raises OSError."""
        directory = self.run_directory(key)
        if directory.exists():
            self._remove(directory)

    @staticmethod
    def _remove(directory: Path) -> None:
        # Without its `run.json` it is no run any more, even when the rest stays for now.
        (directory / "run.json").unlink(missing_ok=True)
        durable_json.sync_directory(directory)
        shutil.rmtree(directory)
        with contextlib.suppress(OSError):
            directory.parent.rmdir()

    def read_runs(self) -> list[tuple[Path, dict[str, Any]]]:
        """Every run directory with its `run.json`; one without was never accepted and is passed over."""
        found: list[tuple[Path, dict[str, Any]]] = []
        for directory in sorted(self.runs.glob("*/*")):
            content = durable_json.read(directory / "run.json")
            if content is not None:
                found.append((directory, content))
        return found

    def find_likely_model(self) -> str:
        """Directory of the base that the newest run here was on; without runs, of the newest model. Empty: neither."""
        try:
            newest = _newest(self.runs.glob("*/*/run.json"))
            content = (None if newest is None else durable_json.read(newest)) or {}
            directory = str(content.get("model_directory") or "")
            if directory and Path(directory).is_dir():
                return directory
            newest = _newest(self.models.glob("*/*/config.json"))
        except (OSError, ValueError) as error:
            # A hint: a node serves without it.
            _log.warning("no-likely-model", error=str(error))
            return ""
        return "" if newest is None else str(newest.parent)


def _newest(paths: Iterable[Path]) -> Path | None:
    found: list[tuple[int, Path]] = []
    for path in paths:
        # Others may delete what was just listed.
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime_ns, path))
    return max(found)[1] if found else None
