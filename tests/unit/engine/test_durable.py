"""A directory is there whole or not at all, and damage to it is seen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from gpu_service.engine import durable


def _write(destination: Path, content: str = "content") -> None:
    with durable.staged(destination) as staging:
        (staging / "inner").mkdir()
        (staging / "inner/file.txt").write_text(content)
        durable.write_manifest(staging, {"step": 3}, durable.list_files(staging))


def test_round_trip(tmp_path: Path) -> None:
    _write(tmp_path / "made")
    manifest = durable.read_manifest(tmp_path / "made")
    assert manifest["step"] == 3
    assert [entry["path"] for entry in manifest["files"]] == ["inner/file.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), durable.staged(tmp_path / "made") as staging:
        (staging / "half.txt").write_text((staging / "missing.txt").read_text())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".staging-made").mkdir()
    (tmp_path / ".staging-made/half.txt").write_text("left by a death")
    _write(tmp_path / "made")
    assert not (tmp_path / "made/half.txt").exists()


def test_an_older_directory_is_replaced(tmp_path: Path) -> None:
    _write(tmp_path / "made", "old")
    _write(tmp_path / "made", "new")
    assert (tmp_path / "made/inner/file.txt").read_text() == "new"


@pytest.mark.parametrize("damage", ["change", "cut", "remove"])
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    _write(tmp_path / "made")
    path = tmp_path / "made/inner/file.txt"
    if damage == "remove":
        path.unlink()
    else:
        path.write_text("CONTENT" if damage == "change" else "conten")
    with pytest.raises(durable.DamagedDirectory) as caught:
        durable.read_manifest(tmp_path / "made")
    assert caught.value.file == "inner/file.txt"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"files": [{"path": "x"}]}',
        b'{"files": [{"path": 5, "sha256": "", "size_bytes": 0}]}',
        b'{"files": [["path"]]}',
        b'{"files": 3}',
        b'{"step": 1}',
    ],
)
def test_a_manifest_that_is_none_is_damage(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(durable.DamagedDirectory):
        durable.read_manifest(tmp_path)


@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_manifest_that_names_a_file_elsewhere_is_damage(is_absolute: bool, tmp_path: Path) -> None:
    """Although that file is the one that it names."""
    outside, inside = tmp_path / "outside", tmp_path / "made"
    outside.write_bytes(b"content")
    inside.mkdir()
    path = str(outside) if is_absolute else "../outside"
    file = {"path": path, "sha256": hashlib.sha256(b"content").hexdigest(), "size_bytes": 7}
    (inside / "manifest.json").write_text(json.dumps({"files": [file]}))
    with pytest.raises(durable.DamagedDirectory, match="leaves its directory") as caught:
        durable.read_manifest(inside)
    assert caught.value.file == "manifest.json"


def test_a_fact_that_changed_is_damage(tmp_path: Path) -> None:
    """Every file has the hash that the manifest names, but the manifest is not what was written."""
    _write(tmp_path / "made")
    path = tmp_path / "made/manifest.json"
    written = path.read_text()
    for damaged in (written.replace('"step": 3', '"step": 7'), written.replace('"step"', '"stop"')):
        path.write_text(damaged)
        with pytest.raises(durable.DamagedDirectory, match="facts") as caught:
            durable.read_manifest(tmp_path / "made")
        assert caught.value.file == "manifest.json"
    manifest = json.loads(written)
    del manifest["facts_sha256"]
    path.write_text(json.dumps(manifest))
    # One of before there was such a digest.
    assert durable.read_manifest(tmp_path / "made")["step"] == 3


def test_what_is_set_aside_has_lost_its_name(tmp_path: Path) -> None:
    for content in ("first", "second"):
        _write(tmp_path / "made", content)
        aside = durable.set_aside(tmp_path / "made")
        assert aside is not None
        assert (aside / "inner/file.txt").read_text() == content
        assert list(tmp_path.iterdir()) == [aside]
    assert durable.set_aside(tmp_path / "made") is None


def test_delete(tmp_path: Path) -> None:
    _write(tmp_path / "made")
    durable.delete(tmp_path / "made")
    durable.delete(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


class _Heard:
    def __init__(self) -> None:
        self.said: list[int] = []

    def note_progress(self) -> None:
        self.said.append(0)

    def announce_bytes(self, num_bytes: int) -> None:
        self.said.append(num_bytes)


def test_big_files_give_signs_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_CHUNK_BYTES", 10)
    heard = _Heard()
    with durable.staged(tmp_path / "made", heard) as staging:
        (staging / "big").write_bytes(b"x" * 30)
        durable.write_manifest(staging, {}, durable.list_files(staging, heard))
        # One for each chunk that was hashed.
        assert heard.said == [0, 0, 0]
    assert 30 in heard.said
    heard.said.clear()
    durable.read_manifest(tmp_path / "made", heard)
    assert heard.said == [0, 0, 0]
