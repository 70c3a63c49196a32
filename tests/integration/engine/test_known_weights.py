"""Which of a node's records of weight files are believed: digests, pieces, the 4-bit copy; all else is made anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gpu_service.catalog import known_files
from gpu_service.catalog.weight_files import CACHE_FILE, weights_digest
from gpu_service.engine import room
from gpu_service.engine.loading import direct, shell, weights
from gpu_service.engine.reading import piece_digests, prequantized, reader
from tests.fakes.base_loading import load_base, same
from tests.fakes.tiny_models import TinyOptions, place


@pytest.fixture(autouse=True)
def _copies_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prequantized, "SMALLEST_BYTES", 0)
    # Files are as if just written: their bytes are compared.
    monkeypatch.setattr(known_files, "UNSETTLED_SECONDS", 10**6)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are as if they had been there for long."""
    monkeypatch.setattr(known_files, "UNSETTLED_SECONDS", -10)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / place(tmp_path, TinyOptions(sharded=True))


def _entry(cache: Path) -> Path:
    return next((cache / prequantized.DIRECTORY).iterdir())


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _truncate(cache: Path) -> None:
    os.truncate(_entry(cache) / "data", 100)


def _damage_data(cache: Path) -> None:
    _flip(_entry(cache) / "data", -1)


def _damage_manifest(cache: Path) -> None:
    _flip(_entry(cache) / "manifest", 100)


def _empty_manifest(cache: Path) -> None:
    (_entry(cache) / "manifest").write_bytes(b"")


def _put_anothers_in_its_place(cache: Path) -> None:
    path = _entry(cache) / "manifest"
    manifest = piece_digests.unseal(path.read_bytes())
    manifest["identity"]["bitsandbytes"] = "0.0.1"
    path.write_bytes(piece_digests.seal(manifest))


@pytest.mark.parametrize(
    "damage", [_truncate, _damage_data, _damage_manifest, _empty_manifest, _put_anothers_in_its_place]
)
def test_a_copy_that_is_not_to_be_believed_is_made_anew(damage: Any, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected, _ = load_base(model, cache=cache)
    damage(cache)
    found, details = load_base(model, cache=cache)
    assert details["read_from"] == "files"
    same(found.base, expected.base)
    again, details = load_base(model, cache=cache)
    assert details["read_from"] == "the 4-bit copy"
    same(again.base, expected.base)


def test_a_file_that_changed_is_never_covered_by_a_copy(model: Path, tmp_path: Path) -> None:
    load_base(model, cache=tmp_path / "cache", digest=(digest := weights_digest(model)))
    path = sorted(model.glob("model-*.safetensors"))[0]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path)
    with pytest.raises(weights.WeightsChanged):
        load_base(model, cache=tmp_path / "cache", digest=digest)


def test_a_changed_byte_under_the_old_date_is_found(model: Path, tmp_path: Path) -> None:
    """Neither size nor date tells; the pieces' digests do."""
    digest = weights_digest(model)
    load_base(model, cache=tmp_path / "cache", digest=digest)
    path = sorted(model.glob("model-*.safetensors"))[0]
    status = path.stat()
    _flip(path, -1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for one in (tmp_path / "cache" / prequantized.DIRECTORY).iterdir():
        (one / "data").unlink()
    with pytest.raises(weights.WeightsChanged):
        load_base(model, cache=tmp_path / "cache", digest=digest)


@pytest.mark.usefixtures("settled")
def test_what_was_hashed_once_is_not_hashed_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    expected, first = load_base(model, cache=cache)
    for module in (reader, direct):
        monkeypatch.setattr(module, "hashlib", None)
    again, second = load_base(model, cache=cache, digest=next((cache / "weights").iterdir()).stem)
    assert (first["verified_by"], second["verified_by"]) == ("whole", "identity")
    assert second["read_from"] == "the 4-bit copy"
    same(again.base, expected.base)


@pytest.mark.usefixtures("settled")
def test_what_the_node_hashed_for_the_models_digest_is_not_hashed_again(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    digest = weights_digest(model, cache / CACHE_FILE)
    _, details = load_base(model, cache=cache, digest=digest)
    assert (details["verified_by"], details["read_from"]) == ("identity", "files")
    _, details = load_base(model, cache=cache, digest=digest)
    assert (details["verified_by"], details["read_from"]) == ("identity", "the 4-bit copy")
    # Without either's record, everything is hashed as it always was.
    (cache / CACHE_FILE).unlink()
    _, details = load_base(model, cache=cache, digest=digest)
    assert details["verified_by"] == "whole"


def test_what_was_just_written_is_hashed_again(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    digest = weights_digest(model, cache / CACHE_FILE)
    assert [load_base(model, cache=cache, digest=digest)[1]["verified_by"] for _ in range(3)] == [
        "whole",
        "pieces",
        "pieces",
    ]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("keeps_copy", [True, False])
def test_a_changed_byte_under_the_old_date_is_found_among_known_files(
    keeps_copy: bool, model: Path, tmp_path: Path
) -> None:
    """Nobody can set the time of change back."""
    cache = tmp_path / "cache"
    digest = weights_digest(model, cache / CACHE_FILE)
    load_base(model, cache=cache, digest=digest)
    path = sorted(model.glob("model-*.safetensors"))[0]
    status = path.stat()
    _flip(path, -1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    if not keeps_copy:
        shutil.rmtree(cache / prequantized.DIRECTORY)
    with pytest.raises(weights.WeightsChanged):
        load_base(model, cache=cache, digest=digest)


@pytest.mark.usefixtures("settled")
def test_files_that_were_touched_are_hashed_once(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    digest = weights_digest(model)
    load_base(model, cache=cache, digest=digest)
    shutil.rmtree(cache / prequantized.DIRECTORY)
    for path in model.iterdir():
        os.utime(path)
    found = []
    for _ in range(2):
        found.append(load_base(model, cache=cache, digest=digest)[1]["verified_by"])
    assert found == ["pieces", "identity"]


@pytest.mark.usefixtures("settled")
def test_files_that_change_while_they_are_read_are_hashed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    digest = weights_digest(model, cache / CACHE_FILE)
    build = shell.build

    def build_and_flip(*arguments: Any) -> Any:
        _flip(sorted(model.glob("model-*.safetensors"))[0], -1)
        return build(*arguments)

    monkeypatch.setattr(shell, "build", build_and_flip)
    with pytest.raises(weights.WeightsChanged):
        load_base(model, cache=cache, digest=digest)


@pytest.mark.usefixtures("settled")
def test_a_copy_that_was_touched_is_hashed_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    expected, _ = load_base(model, cache=cache)
    os.utime(_entry(cache) / "data")
    found = []
    find = prequantized.find

    def find_and_note(*arguments: Any) -> Any:
        copy = find(*arguments)
        assert copy is not None
        found.append(copy.is_unchanged)
        return copy

    monkeypatch.setattr(prequantized, "find", find_and_note)
    for _ in range(2):
        again, details = load_base(model, cache=cache)
        assert details["read_from"] == "the 4-bit copy"
        same(again.base, expected.base)
    assert found == [False, True]


@pytest.mark.usefixtures("settled")
def test_a_damaged_copy_of_known_files_is_made_anew(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected, _ = load_base(model, cache=cache)
    data = _entry(cache) / "data"
    status = data.stat()
    _flip(data, -1)
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    for source in ("files", "the 4-bit copy"):
        found, details = load_base(model, cache=cache)
        assert (details["verified_by"], details["read_from"]) == ("identity", source)
        same(found.base, expected.base)


def test_a_config_that_asks_for_another_model_is_never_met_by_the_copy(model: Path, tmp_path: Path) -> None:
    load_base(model, cache=tmp_path / "cache")
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"head_dim": config["head_dim"] // 2, "num_key_value_heads": 4}))
    _, details = load_base(model, cache=tmp_path / "cache")
    # What to say of such files is the library's business.
    assert details["quantizer"] == "bitsandbytes"


def test_digests_of_other_pieces_verify_nothing(model: Path, tmp_path: Path) -> None:
    digest = weights_digest(model)
    load_base(model, cache=tmp_path, digest=digest)
    path = tmp_path / piece_digests.DIRECTORY / f"{digest}.json"
    document = piece_digests.unseal(path.read_bytes())
    for pieces in document["pieces"].values():
        pieces.pop(max(pieces, key=int))
    path.write_bytes(piece_digests.seal(document))
    _, details = load_base(model, cache=tmp_path, digest=digest)
    # Everything was hashed from front to back once more.
    assert details["quantizer"] == "bitsandbytes"
    assert not path.exists()


def test_a_copy_that_goes_when_it_is_about_to_be_read_is_not_missed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = load_base(model, cache=tmp_path / "cache")
    find = prequantized.find

    def find_and_lose(*arguments: Any) -> Any:
        found = find(*arguments)
        (_entry(tmp_path / "cache") / "data").unlink()
        return found

    monkeypatch.setattr(prequantized, "find", find_and_lose)
    loaded, details = load_base(model, cache=tmp_path / "cache")
    assert details["read_from"] == "files"
    assert loaded.file == ""
    same(loaded.base, expected.base)


def test_a_disk_without_room_keeps_nothing_and_fails_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(directory: Path, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "require", none_left)
    _, details = load_base(model, cache=tmp_path / "cache")
    assert details["read_from"] == "files"
    assert list((tmp_path / "cache" / prequantized.DIRECTORY).iterdir()) == []
