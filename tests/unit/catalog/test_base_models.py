"""Base models are read as facts, and what is broken or wants code run is refused with its file and stage."""

import json
import os
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_service.catalog import base_models, known_files, weight_files
from gpu_service.catalog.known_files import FileIdentity
from gpu_service.catalog.weight_files import remembered_weights_digest
from gpu_service.domain.errors import Refusal
from tests.fakes.tiny_models import TinyOptions, place_header_only, write_zero_weights

NAME = "tiny/llama"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    place_header_only(tmp_path)
    return tmp_path


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}), encoding="utf-8")


def refusal(models: Path, name: str = NAME) -> Refusal:
    with pytest.raises(Refusal) as caught:
        base_models.read(models, name)
    return caught.value


def test_facts_of_a_llama(models: Path) -> None:
    base = base_models.read(models, NAME)
    assert (base.config_type, base.hidden_size, base.num_layers) == ("llama", 64, 2)
    assert (base.vocabulary_size, base.max_position_embeddings) == (512, 512)
    assert base.has_chat_template
    assert len(base.linear_layers) == 14
    assert {(layer.leaf, layer.in_features, layer.out_features) for layer in base.linear_layers} == {
        ("q_proj", 64, 64),
        ("k_proj", 64, 32),
        ("v_proj", 64, 32),
        ("o_proj", 64, 64),
        ("gate_proj", 64, 128),
        ("up_proj", 64, 128),
        ("down_proj", 128, 64),
    }
    assert base.linear_layers[0].path == "model.layers.0.mlp.down_proj"
    assert base.num_parameters == 139_584
    assert base.size_bytes == (models / NAME / "model.safetensors").stat().st_size
    assert not base_models.read(models, place_header_only(models, TinyOptions(chat_template=False))).has_chat_template


@pytest.mark.parametrize(
    "name", ["tiny/other", "../etc", "tiny", "tiny/../tiny", "/tiny/llama", "tiny/llama/", "", "a/b/c"]
)
def test_names_that_are_not_there_list_those_that_are(models: Path, name: str) -> None:
    place_header_only(models, name="other/model")
    found = refusal(models, name)
    assert found.reason == "MODEL_NOT_FOUND"
    assert found.details["available_models"] == "other/model,tiny/llama"


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("config.json", "CONFIG"),
        ("tokenizer_config.json", "TOKENIZER"),
        ("processor_config.json", "CONFIG"),
        ("preprocessor_config.json", "CONFIG"),
    ],
)
def test_remote_code_is_refused(models: Path, file: str, stage: str) -> None:
    edit_json(models / NAME / file, auto_map={"AutoModel": "modeling.Model"})
    found = refusal(models)
    assert (found.reason, found.file, found.stage) == ("REMOTE_CODE_REFUSED", file, stage)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting"),
        (b"{", "Expecting"),
        (b"[]", "not a JSON object"),
        (b"\xff", "decode"),
        (b"[" * 200_000, "recursion"),
        (b'{"hidden_size": "64"}', "hidden_size"),
        (b'{"model_type": 3}', "model_type"),
    ],
)
def test_a_broken_config_is_refused(models: Path, content: bytes, message: str) -> None:
    (models / NAME / "config.json").write_bytes(content)
    found = refusal(models)
    assert (found.reason, found.file, found.stage) == ("MODEL_INVALID", "config.json", "CONFIG")
    assert re.search(message, found.message)


def test_a_config_without_model_type_is_read(models: Path) -> None:
    edit_json(models / NAME / "config.json", model_type=None)
    assert base_models.read(models, NAME).config_type == ""


def test_quantized_weights_are_no_base(models: Path) -> None:
    edit_json(models / NAME / "config.json", quantization_config={"quant_method": "gptq"})
    assert refusal(models).reason == "MODEL_INVALID"


def test_pickles_are_refused_and_left_alone_beside_safetensors(models: Path) -> None:
    directory = models / NAME
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert base_models.read(models, NAME).num_parameters == 139_584
    (directory / "model.safetensors").unlink()
    found = refusal(models)
    assert (found.reason, found.file) == ("PICKLE_REFUSED", "pytorch_model.bin")
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert refusal(models).reason == "PICKLE_REFUSED"


def header(value: Any, data: bytes = b"") -> bytes:
    encoded = json.dumps(value).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, b"\0" * 8),
        header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, b"\0" * 8),
        header({"a": 3}),
    ],
)
def test_a_broken_safetensors_file_is_refused(models: Path, content: bytes) -> None:
    (models / NAME / "model.safetensors").write_bytes(content)
    found = refusal(models)
    assert (found.reason, found.file, found.stage) == ("MODEL_INVALID", "model.safetensors", "WEIGHTS")


@pytest.mark.parametrize(
    "shard", ["missing.safetensors", "../model.safetensors", "/etc/passwd", ".hidden.safetensors", 3]
)
def test_a_bad_index_is_refused(models: Path, shard: Any) -> None:
    index = {"weight_map": {"a": shard}}
    (models / NAME / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = refusal(models)
    assert (found.reason, found.stage) == ("MODEL_INVALID", "WEIGHTS")


def test_shards_are_one_model(models: Path) -> None:
    directory = models / NAME
    (directory / "model.safetensors").unlink()
    for number, layer in enumerate((0, 1), 1):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        write_zero_weights(directory / f"model-0000{number}-of-00002.safetensors", {name: (64, 64)})
    weight_map = {
        f"model.layers.{at}.self_attn.q_proj.weight": f"model-0000{at + 1}-of-00002.safetensors" for at in (0, 1)
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert base_models.read(models, NAME).num_parameters == 2 * 64 * 64
    # The same tensor in both is a contradiction.
    write_zero_weights(
        directory / "model-00002-of-00002.safetensors", {"model.layers.0.self_attn.q_proj.weight": (64, 64)}
    )
    assert refusal(models).reason == "MODEL_INVALID"


def test_a_model_without_tokenizer_is_refused(models: Path) -> None:
    (models / NAME / "tokenizer.json").unlink()
    found = refusal(models)
    assert (found.reason, found.stage, found.file) == ("MODEL_INVALID", "TOKENIZER", "tokenizer.json")


def test_scan_says_what_is_wrong_and_goes_on(models: Path) -> None:
    place_header_only(models, name="other/broken")
    (models / "other/broken/config.json").write_bytes(b"{")
    (models / "stray-file").write_bytes(b"")
    found = {base.name: base.problem for base in base_models.scan(models)}
    assert found["tiny/llama"] == ""
    assert "config.json" in found["other/broken"]
    assert base_models.scan(models / "nowhere") == []


def test_the_weights_digest_is_over_content_and_remembered(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "UNSETTLED_SECONDS", -1)
    directory = models / NAME
    path = directory / "model.safetensors"
    cache = tmp_path / "cache" / "digests.json"
    first = base_models.weights_digest(directory, cache)
    assert first == base_models.weights_digest(directory)
    identities = {path: FileIdentity.of(path)}
    assert remembered_weights_digest(identities, cache) == first
    # A remembered hash is used: this one is planted.
    records = json.loads(cache.read_text(encoding="utf-8"))
    cache.write_text(
        json.dumps({key: {**record, "sha256": "0" * 64} for key, record in records.items()}), encoding="utf-8"
    )
    assert base_models.weights_digest(directory, cache) == remembered_weights_digest(identities, cache) != first
    # Other content has another identity, so nothing stale is believed.
    with path.open("ab") as file:
        file.write(b"\1")
    assert remembered_weights_digest({path: FileIdentity.of(path)}, cache) == ""
    assert base_models.weights_digest(directory, cache) == base_models.weights_digest(directory) != first
    cache.write_bytes(b"not json")
    assert base_models.weights_digest(directory, cache) == base_models.weights_digest(directory)


def test_content_of_the_same_size_under_the_old_date_is_hashed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "UNSETTLED_SECONDS", -1)
    directory = models / NAME
    path, cache = directory / "model.safetensors", tmp_path / "digests.json"
    first = base_models.weights_digest(directory, cache)
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    # Not within the tick in which the file was made.
    while time.time_ns() < status.st_ctime_ns + 20_000_000:
        time.sleep(0.001)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert base_models.weights_digest(directory, cache) == base_models.weights_digest(directory) != first


def test_what_was_written_just_before_it_was_hashed_is_not_remembered(models: Path, tmp_path: Path) -> None:
    path, cache = models / NAME / "model.safetensors", tmp_path / "digests.json"
    # As if a clock ran ahead.
    os.utime(path, ns=(time.time_ns() + 10**12,) * 2)
    base_models.weights_digest(models / NAME, cache)
    assert remembered_weights_digest({path: FileIdentity.of(path)}, cache) == ""


def test_what_changes_while_it_is_hashed_is_not_remembered(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "UNSETTLED_SECONDS", -1)
    path, cache = models / NAME / "model.safetensors", tmp_path / "digests.json"
    hash_file = weight_files._hash_file

    def hash_and_touch(one: Path) -> str:
        digest = hash_file(one)
        os.utime(one, ns=(0, 0))
        return digest

    monkeypatch.setattr(weight_files, "_hash_file", hash_and_touch)
    base_models.weights_digest(models / NAME, cache)
    assert remembered_weights_digest({path: FileIdentity.of(path)}, cache) == ""


@pytest.mark.parametrize(
    ("template", "has"),
    [
        ("{{ 1 }}", True),
        ("", False),
        (None, False),
        ([{"name": "default", "template": "{{ 1 }}"}], True),
        ([{"name": "tool_use", "template": "{{ 1 }}"}], False),
    ],
)
def test_where_a_chat_template_is_found(models: Path, template: Any, has: bool) -> None:
    edit_json(models / NAME / "tokenizer_config.json", chat_template=template)
    assert base_models.read(models, NAME).has_chat_template == has
    (models / NAME / "chat_template.jinja").write_text("{{ 2 }}", encoding="utf-8")
    assert base_models.read(models, NAME).has_chat_template
