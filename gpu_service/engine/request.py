"""Reads `run.json`, the whole of what an engine is told about a run. Changes nothing and decides nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from tunesmith.common.v1 import training_spec_pb2


@dataclass(frozen=True, kw_only=True)
class DeviceChoice:
    """Which device the server gave the run: type `cpu` or `cuda`, and its index (-1 for the CPU)."""

    type: str
    index: int = -1


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A committed checkpoint to go on from. `directory` holds its manifest; `step` steps were done; `source` is where
    an earlier attempt on this node wrote it, None for one that came from elsewhere.
    """

    directory: Path
    name: str
    step: int
    source: Path | None = None


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """What an earlier job left, whose weights this one begins with: `adapter`, `model`, or a checkpoint's name."""

    directory: Path
    name: str


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """One attempt at a job, as the server persisted it."""

    run_directory: Path
    job_id: str
    attempt: int
    spec_digest: str
    spec: training_spec_pb2.TrainingSpec
    # The spec as it stands in the file, for the planner.
    spec_json: dict[str, Any]
    weights_digest: str
    model_directory: Path
    blobs_directory: Path
    cache_directory: Path
    device: DeviceChoice
    resume: ResumePoint | None
    # What the node measured of such runs, as the planner takes it.
    calibrations: dict[str, Any] = field(default_factory=dict)
    # What trains such runs as far as the node knows, `fast` or `reference`; empty where it did not say.
    trainer: str = ""
    start: StartPoint | None = None

    @property
    def journal_path(self) -> Path:
        return self.run_directory / "journal"

    @property
    def checkpoints_directory(self) -> Path:
        return self.run_directory / "checkpoints"

    @property
    def artifacts_directory(self) -> Path:
        return self.run_directory / "artifacts"


def read(run_directory: Path) -> RunRequest:
    """Read `<run_directory>/run.json`.

    Raises OSError, ValueError (no JSON), KeyError (a missing field), json_format.ParseError (a spec that is none).
    """
    document = json.loads((run_directory / "run.json").read_text(encoding="utf-8"))
    spec = json_format.ParseDict(document["spec"], training_spec_pb2.TrainingSpec())
    resume, start = document.get("resume"), document.get("start_from")
    return RunRequest(
        run_directory=run_directory,
        job_id=document["job_id"],
        attempt=int(document["attempt"]),
        spec_digest=document["spec_digest"],
        spec=spec,
        spec_json=document["spec"],
        weights_digest=document["weights_digest"],
        model_directory=Path(document["model_directory"]),
        blobs_directory=Path(document["blobs_directory"]),
        cache_directory=Path(document["cache_directory"]),
        device=DeviceChoice(type=document["device"]["type"], index=int(document["device"].get("index", -1))),
        resume=None if resume is None else _resume_point(resume),
        calibrations=document.get("calibrations") or {},
        trainer=document.get("trainer") or "",
        start=None if start is None else StartPoint(directory=Path(start["directory"]), name=start["name"]),
    )


def _resume_point(resume: dict[str, Any]) -> ResumePoint:
    source = resume.get("source_directory")
    return ResumePoint(
        directory=Path(resume["checkpoint_directory"]),
        name=resume["checkpoint"],
        step=int(resume["step"]),
        source=Path(source) if source else None,
    )
