"""run.json as the server writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from gpu_service.engine import request

_DOCUMENT: dict[str, Any] = {
    "installation_id": "i",
    "job_id": "01J",
    "attempt": 2,
    "spec_digest": "0",
    "spec": {
        "base_model": "org/name",
        "training_type": "qlora",
        "hyperparameters": {"seed": "7", "lora": {"rank": 8}},
        "datasets": [{"dataset_id": 1, "size_bytes": "9007199254740993"}],
    },
    "weights_digest": "ab",
    "model_directory": "/models/org/name",
    "blobs_directory": "/blobs",
    "cache_directory": "/cache",
    "device": {"type": "cuda", "index": 1},
    "resume": None,
}


def _read(tmp_path: Path, **changes: Any) -> request.RunRequest:
    (tmp_path / "run.json").write_text(json.dumps(_DOCUMENT | changes))
    return request.read(tmp_path)


def test_everything_is_read(tmp_path: Path) -> None:
    read = _read(tmp_path)
    assert read.attempt == 2
    assert read.spec.hyperparameters.seed == 7
    assert read.spec.hyperparameters.lora.rank == 8
    assert read.spec.datasets[0].size_bytes == 9007199254740993
    assert read.spec_json == _DOCUMENT["spec"]
    assert read.device == request.DeviceChoice(type="cuda", index=1)
    assert read.resume is None
    assert read.journal_path == tmp_path / "journal"


def test_resume(tmp_path: Path) -> None:
    read = _read(
        tmp_path, resume={"checkpoint_directory": "/c/step-00000020", "checkpoint": "step-00000020", "step": 20}
    )
    assert read.resume == request.ResumePoint(directory=Path("/c/step-00000020"), name="step-00000020", step=20)


@pytest.mark.parametrize("changes", [{"spec": {"no_such_field": 1}}, {"spec": {"training_type": 5}}, {"attempt": "x"}])
def test_what_is_no_request_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((ValueError, json_format.ParseError)):
        _read(tmp_path, **changes)
