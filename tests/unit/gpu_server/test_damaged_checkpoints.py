"""A damaged checkpoint is found before it is used, set aside, and keeps nothing else from being found."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gpu_service.domain.errors import Refusal
from gpu_service.runs.manifests import FileReference
from gpu_service.runs.run_files import ResumeRequest, find_file, prepare_resume, read_trainer

_STEP = "step-00000020"


def _checkpoint(run: Path, content: bytes = b"weights", name: str = _STEP) -> str:
    directory = run / "checkpoints" / name
    directory.mkdir(parents=True)
    (directory / "weights.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    files = [{"path": "weights.safetensors", "sha256": digest, "size_bytes": len(content)}]
    (directory / "manifest.json").write_text(json.dumps({"step": 20, "files": files}))
    return digest


def _names(directory: Path) -> list[str]:
    return [one.name for one in directory.iterdir()]


def _damages() -> dict[str, bytes]:
    whole = json.dumps({"step": 20, "files": [{"path": "weights.safetensors", "sha256": "0" * 64, "size_bytes": 7}]})
    return {
        "cut": whole.encode()[: len(whole) // 2],
        "empty": b"",
        "zeros": b"\0" * len(whole),
        "not-utf-8": b"\xff\xfe" + whole.encode(),
        "no-object": b"[]",
        "no-files": b'{"step": 20}',
        "files-are-a-number": b'{"files": 7}',
        "a-file-is-text": b'{"files": ["weights.safetensors"]}',
        "a-file-without-digest": b'{"files": [{"path": "weights.safetensors", "size_bytes": 7}]}',
        "a-path-that-climbs": whole.replace("weights", "../../../1/weights").encode(),
        "a-path-from-the-root": whole.replace("weights", "/weights").encode(),
        "no-path": whole.replace("weights.safetensors", ".").encode(),
        "a-path-is-a-number": whole.replace('"weights.safetensors"', "5").encode(),
    }


@pytest.mark.parametrize("damage", _damages())
def test_a_damaged_manifest_hides_nothing_of_others(damage: str, tmp_path: Path) -> None:
    """Whatever is read from the node, artifacts of a later attempt say, is looked for past it."""
    _checkpoint(tmp_path / "1")
    manifest = tmp_path / "1" / "checkpoints" / _STEP / "manifest.json"
    manifest.write_bytes(_damages()[damage])
    sound = _checkpoint(tmp_path / "2", b"later weights")

    found = find_file([tmp_path / "1", tmp_path / "2"], sound)

    assert found == tmp_path / "2" / "checkpoints" / _STEP / "weights.safetensors"
    assert _names(tmp_path / "1" / "checkpoints") == [f".damaged-{_STEP}"]


@pytest.mark.parametrize(
    "damaged",
    [
        '{"artifacts": [{"name": "adapter", "fi',
        '{"artifacts": [{"name": "../checkpoints", "files": []}]}',
        '{"artifacts": [{"name": "adapter", "files": [{"path": "../../x", "sha256": "0", "size_bytes": 1}]}]}',
    ],
)
def test_damaged_artifacts_hide_nothing_of_others(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "1" / "artifacts").mkdir(parents=True)
    (tmp_path / "1" / "artifacts" / "manifest.json").write_text(damaged)
    sound = _checkpoint(tmp_path / "2")
    assert find_file([tmp_path / "1", tmp_path / "2"], sound) is not None


def test_a_file_of_another_size_is_not_the_one_that_was_asked_for(tmp_path: Path) -> None:
    digest = _checkpoint(tmp_path / "1")
    assert _checkpoint(tmp_path / "2") == digest
    os.truncate(tmp_path / "1" / "checkpoints" / _STEP / "weights.safetensors", 3)
    assert find_file([tmp_path / "1", tmp_path / "2"], digest) == (
        tmp_path / "2" / "checkpoints" / _STEP / "weights.safetensors"
    )


def _resume(job: Path) -> dict[str, Any]:
    request = ResumeRequest(checkpoint=_STEP, step=20, attempt=1, files=[])
    return prepare_resume(request, job_directory=job, target=job / "2" / "resume", blob_path=lambda _: job)


@pytest.mark.parametrize("damage", _damages())
def test_a_checkpoint_with_a_damaged_manifest_is_refused_and_set_aside(damage: str, tmp_path: Path) -> None:
    _checkpoint(tmp_path / "1")
    checkpoints = tmp_path / "1" / "checkpoints"
    (checkpoints / _STEP / "manifest.json").write_bytes(_damages()[damage])
    with pytest.raises(Refusal, match=f"RESUME_MISMATCH: checkpoint {_STEP} is damaged"):
        _resume(tmp_path)
    assert _names(checkpoints) == [f".damaged-{_STEP}"]
    # As if there never had been one: asked again, the node says so.
    with pytest.raises(Refusal, match="CHECKPOINT_NOT_FOUND"):
        _resume(tmp_path)


@pytest.mark.parametrize("size_bytes", [None, 0, 3, 8])
def test_a_file_that_is_gone_or_has_another_size_is_found_before_it_is_used(
    size_bytes: int | None, tmp_path: Path
) -> None:
    _checkpoint(tmp_path / "1")
    weights = tmp_path / "1" / "checkpoints" / _STEP / "weights.safetensors"
    if size_bytes is None:
        weights.unlink()
    else:
        os.truncate(weights, size_bytes)
    with pytest.raises(Refusal, match="RESUME_MISMATCH"):
        _resume(tmp_path)
    assert not weights.parent.exists()
    assert not (tmp_path / "2").exists()


def test_a_disk_that_cannot_read_it_is_damage_and_one_without_descriptors_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _checkpoint(tmp_path / "1")
    code = errno.EMFILE

    def refuse(path: Path) -> bytes:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        _resume(tmp_path)
    assert _names(tmp_path / "1" / "checkpoints") == [_STEP]
    code = errno.EIO
    with pytest.raises(Refusal, match="RESUME_MISMATCH"):
        _resume(tmp_path)
    assert _names(tmp_path / "1" / "checkpoints") == [f".damaged-{_STEP}"]


def test_a_whole_one_says_where_it_was_written(tmp_path: Path) -> None:
    """By which an engine that finds a byte changed sets the right one aside."""
    _checkpoint(tmp_path / "1")
    assert _resume(tmp_path)["source_directory"] == str(tmp_path / "1" / "checkpoints" / _STEP)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / ("0" * 64)).write_bytes(b"{}")
    files = [FileReference(path="manifest.json", sha256="0" * 64, size_bytes=2)]
    request = ResumeRequest(checkpoint=_STEP, step=20, attempt=1, files=files)
    made = prepare_resume(request, job_directory=tmp_path, target=tmp_path / "3", blob_path=lambda sha: blobs / sha)
    assert made["source_directory"] == ""


@pytest.mark.parametrize("comes_as_blobs", [False, True])
@pytest.mark.parametrize(
    ("content", "trainer"),
    [
        (b'{"trainer": "fast", "files": []}', "fast"),
        (b'{"trainer": "reference"}', "reference"),
        # Of a version that did not say.
        (b'{"step": 20}', ""),
        (b"[]", ""),
        (b"", ""),
        (None, ""),
    ],
)
def test_what_trained_a_checkpoint(comes_as_blobs: bool, content: bytes | None, trainer: str, tmp_path: Path) -> None:
    manifest = tmp_path / ("blob" if comes_as_blobs else f"1/checkpoints/{_STEP}/manifest.json")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        manifest.write_bytes(content)
    files = [FileReference(path="manifest.json", sha256="0" * 64, size_bytes=1)] if comes_as_blobs else []
    request = ResumeRequest(checkpoint=_STEP, step=20, attempt=1, files=files)
    assert read_trainer(request, job_directory=tmp_path, blob_path=lambda digest: tmp_path / "blob") == trainer


def test_nothing_is_read_where_no_checkpoint_is_named(tmp_path: Path) -> None:
    files = [FileReference(path="weights.safetensors", sha256="0" * 64, size_bytes=1)]
    for request in (
        None,
        ResumeRequest(checkpoint="../../etc", step=20, attempt=1, files=[]),
        ResumeRequest(checkpoint=_STEP, step=20, attempt=1, files=files),
    ):
        assert read_trainer(request, job_directory=tmp_path, blob_path=lambda digest: tmp_path) == ""
