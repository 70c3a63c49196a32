"""R19: whatever is told to be a checkpoint or an artifact is there, whole, with the bytes that its manifest names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.faults.checker.evidence import Evidence, Run
from tests.faults.checker.states import TERMINAL
from tests.faults.checker.tally import Tally
from tunesmith.common.v1 import event_pb2

_MANIFEST = "manifest.json"


def check_checkpoints(evidence: Evidence, tally: Tally) -> None:
    """R19: on nodes every directory with a checkpoint's name is whole; in the database every copy that is told of."""
    for runs in evidence.runs.values():
        for run in runs:
            for directory in sorted(run.directory.glob("checkpoints/*")):
                # Hidden ones are being staged or deleted.
                if not directory.name.startswith("."):
                    problem = directory_problem(directory)
                    tally.expect("R19", problem is None, f"{run.node}, job {run.job_id}: {directory.name}: {problem}")
    for row in evidence.database.checkpoints:
        name = f"job {row['job_id']}: {row['status']} checkpoint {row['name']}"
        if row["status"] == "REPLICATED":
            for file in row["files"]:
                problem = _blob_problem(evidence, file)
                tally.expect("R19", problem is None, f"{name}: {problem}")
        elif row["status"] == "COMMITTED":
            _check_committed(evidence, row, name, tally)


def _check_committed(evidence: Evidence, row: Mapping[str, Any], name: str, tally: Tally) -> None:
    for run in evidence.runs.get((row["job_id"], row["attempt"]), ()):
        directory = run.directory / "checkpoints" / row["name"]
        if directory.is_dir():
            digest = hashlib.sha256((directory / _MANIFEST).read_bytes()).hexdigest()
            tally.expect("R19", digest == row["manifest_sha256"], f"{name} has another manifest than was told")
            continue
        job = evidence.database.jobs[row["job_id"]]
        # Retention deletes older ones before it tells of it; the newest, never. What is over may be released.
        newest = max(_committed_steps(run), default=-1)
        tally.expect(
            "R19",
            job["state"] in TERMINAL or row["step"] < newest or row["name"] in _deleted_names(run),
            f"{name} is not on its node, and it is the newest",
        )


def _committed_steps(run: Run) -> list[int]:
    return [told.step for told in _told(run) if told.status == event_pb2.CHECKPOINT_STATUS_COMMITTED]


def _deleted_names(run: Run) -> set[str]:
    return {told.name for told in _told(run) if told.status == event_pb2.CHECKPOINT_STATUS_DELETED}


def _told(run: Run) -> list[event_pb2.CheckpointEvent]:
    payloads = (event_pb2.EventPayload.FromString(event.payload) for event in run.journal.events)
    return [payload.checkpoint for payload in payloads if payload.HasField("checkpoint")]


def directory_problem(directory: Path) -> str | None:
    """What is wrong with a directory that has a manifest of its files; None when it is whole."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{_MANIFEST}: {error}"
    return _first(_file_problem(directory / file["path"], file) for file in files)


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _file_problem(path: Path, file: Mapping[str, Any]) -> str | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"{file['path']}: {error.strerror}"
    if len(data) != int(file["size_bytes"]):
        return f"{file['path']} has {len(data)} bytes, not {file['size_bytes']}"
    digest = hashlib.sha256(data).hexdigest()
    return None if digest == file["sha256"] else f"{file['path']} has SHA-256 {digest}, not {file['sha256']}"


def _blob_problem(evidence: Evidence, file: Mapping[str, Any]) -> str | None:
    sha256 = file["sha256"]
    return _file_problem(evidence.control_directory / "blobs" / sha256[:2] / sha256, file)


def check_artifacts(evidence: Evidence, tally: Tally) -> None:
    """R19: what was collected lies in control's store and below the output root; what succeeded has its artifacts."""
    for row in evidence.database.artifacts:
        name = f"job {row['job_id']}: artifact {row['name']}"
        for file in row["files"]:
            problem = _blob_problem(evidence, file)
            tally.expect("R19", problem is None, f"{name} in the store: {problem}")
            problem = _file_problem(evidence.output_root / row["path"] / file["path"], file)
            tally.expect("R19", problem is None, f"{name} in the output: {problem}")
    collected = {row["job_id"] for row in evidence.database.artifacts}
    for job_id, row in evidence.database.jobs.items():
        if row["state"] == "SUCCEEDED" and not _were_deleted(evidence, job_id):
            tally.expect("R19", job_id in collected, f"job {job_id} SUCCEEDED and has no artifact")
    # A dataset is what a job trains on: its bytes are as much acknowledged as its record.
    for dataset in evidence.database.datasets.values():
        problem = _blob_problem(
            evidence, {"path": dataset["name"], "sha256": dataset["sha256"], "size_bytes": dataset["size_bytes"]}
        )
        tally.expect("R1", problem is None, f"dataset {dataset['dataset_id']}: {problem}")


def _were_deleted(evidence: Evidence, job_id: str) -> bool:
    return bool(evidence.operations_on(job_id, "DeleteArtifact"))
