"""A Hugging Face directory is copied in part, and refused for what could run code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gpu_service.engine.importing.directory import copy_directory
from gpu_service.engine.importing.errors import ImportRefused, Reason
from gpu_service.engine.importing.inspection import CONFIG_FILES, inspect_model
from tests.unit.importing.directories import write_json, write_model, write_safetensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source")


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    path = tmp_path / "destination"
    path.mkdir()
    return path


def test_only_what_training_needs_is_copied(source: Path, destination: Path) -> None:
    for name in ("modeling_custom.py", "pytorch_model.bin", "optimizer.pt", "flax_model.msgpack", "other.safetensors"):
        (source / name).touch()
    (source / "original").mkdir()
    (source / "LICENSE").write_text("terms")
    copy_directory(source, destination)
    assert sorted(path.name for path in destination.iterdir()) == [
        "LICENSE",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (source / "pytorch_model.bin").exists()


def test_links_are_followed(source: Path, destination: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    copy_directory(source, destination)
    assert not (destination / "model.safetensors").is_symlink()
    assert inspect_model(destination).num_parameters == 10


def test_the_summary_counts_parameters_and_digests_weights(source: Path) -> None:
    summary = inspect_model(source)
    assert (summary.model_type, summary.num_parameters, summary.dtypes) == ("llama", 10, ("F32",))
    assert summary.has_chat_template
    shell = subprocess.run(
        "sha256sum *.safetensors | sha256sum", shell=True, cwd=source, capture_output=True, text=True, check=True
    )
    assert summary.weights_digest == shell.stdout.split()[0]


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_remote_code_is_refused_in_every_config(source: Path, destination: Path, name: str) -> None:
    write_json(source / name, {"model_type": "llama", "auto_map": {"AutoModel": "modeling_custom.Model"}})
    _refused(source, destination, Reason.REMOTE_CODE, name)
    assert list(destination.iterdir()) == []


def test_pickle_weights_are_refused_by_name(source: Path, destination: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    message = _refused(source, destination, Reason.PICKLE_WEIGHTS, "pytorch_model.bin")
    assert "safetensors" in message


def test_shards_are_copied_with_their_index(source: Path, destination: Path) -> None:
    _shard(source, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    copy_directory(source, destination)
    assert inspect_model(destination).num_parameters == 6
    assert (destination / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", "absent.safetensors"])
def test_an_index_may_name_only_its_own_shards(source: Path, destination: Path, name: str) -> None:
    _shard(source, {"a": name})
    _refused(source, destination, Reason.INVALID_MODEL, name)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": 1, "b": "model-1.safetensors"}])
def test_an_index_without_a_sound_map_is_refused(source: Path, destination: Path, weight_map: object) -> None:
    _shard(source, weight_map)
    _refused(source, destination, Reason.INVALID_MODEL, "weight_map")


@pytest.mark.parametrize(
    "damage", [b"", b"\x00" * 4, b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"[]", b"\x02" + b"\x00" * 7 + b"{"]
)
def test_a_file_that_is_not_safetensors_is_refused(source: Path, damage: bytes) -> None:
    (source / "model.safetensors").write_bytes(damage)
    with pytest.raises(ImportRefused) as caught:
        inspect_model(source)
    assert caught.value.reason is Reason.INVALID_MODEL
    assert "model.safetensors" in caught.value.message


@pytest.mark.parametrize("change", [-1, 1])
def test_a_weights_file_of_another_length_is_refused(source: Path, change: int) -> None:
    path = source / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + b"\x00")
    with pytest.raises(ImportRefused, match="cut short or changed"):
        inspect_model(source)


@pytest.mark.parametrize(("name", "text"), [("config.json", "[]"), ("config.json", "{"), ("config.json", "{}")])
def test_a_broken_config_is_refused(source: Path, name: str, text: str) -> None:
    (source / name).write_text(text)
    with pytest.raises(ImportRefused, match=name):
        inspect_model(source)


def test_a_missing_tokenizer_is_refused(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(ImportRefused, match="no tokenizer"):
        inspect_model(source)


def test_a_source_that_is_not_there_is_refused(tmp_path: Path, destination: Path) -> None:
    _refused(tmp_path / "absent", destination, Reason.SOURCE_NOT_FOUND, "absent")


def _shard(source: Path, weight_map: object) -> None:
    (source / "model.safetensors").unlink()
    for number in (1, 2):
        write_safetensors(source / f"model-{number}.safetensors", {"ab"[number - 1]: (3,)})
    write_json(source / "model.safetensors.index.json", {"weight_map": weight_map})


def _refused(source: Path, destination: Path, reason: Reason, part: str) -> str:
    with pytest.raises(ImportRefused) as caught:
        copy_directory(source, destination)
    assert caught.value.reason is reason
    assert part in caught.value.message
    return caught.value.message
