"""The engine's own reader against the library: the same model, bit for bit; what ends a reading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_service.catalog import known_files
from gpu_service.engine.builders.methods import qlora
from gpu_service.engine.builders.quantization import nf4
from gpu_service.engine.fast_path.nf4 import NotNf4
from gpu_service.engine.loading import direct, weights
from gpu_service.engine.loading.work import LoadRequest
from gpu_service.engine.reading import piece_digests, prequantized, reader
from tests.fakes.base_loading import load_base, same
from tests.fakes.tiny_models import TinyOptions, place


@pytest.fixture(autouse=True)
def _copies_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prequantized, "SMALLEST_BYTES", 0)
    # Files are as if just written: their bytes are compared.
    monkeypatch.setattr(known_files, "UNSETTLED_SECONDS", 10**6)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny tensors have many."""
    for module in (reader, piece_digests, prequantized):
        monkeypatch.setattr(module, "PIECE_BYTES", 1024)
    monkeypatch.setattr("gpu_service.engine.reading.flat_nf4.PIECE_BYTES", 1024)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / place(tmp_path, TinyOptions(sharded=True))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        TinyOptions(),
        TinyOptions(tied=True),
        TinyOptions(sharded=True),
        TinyOptions(family="qwen2"),
        TinyOptions(family="qwen3"),
        TinyOptions(family="mistral"),
    ],
    ids=lambda options: options.name,
)
def test_the_model_is_the_librarys_bit_for_bit(options: TinyOptions, double: bool, tmp_path: Path) -> None:
    directory = tmp_path / place(tmp_path, options)
    settings: dict[str, Any] = {"model_type": options.family, "double": double}
    expected, _ = load_base(directory, cache=None, quantizer="bitsandbytes", **settings)

    first, first_details = load_base(directory, cache=tmp_path / "cache", **settings)
    again, again_details = load_base(directory, cache=tmp_path / "cache", **settings)

    assert first_details["read_from"] == "files"
    assert again_details["read_from"] == "the 4-bit copy"
    assert first_details["quantizer"] == again_details["quantizer"] == "own"
    assert first.stored_dtype == again.stored_dtype == expected.stored_dtype
    same(first.base, expected.base)
    same(again.base, expected.base)


@pytest.mark.parametrize("training_type", ["lora", "full"])
def test_plain_models_are_the_librarys_too(
    training_type: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"method": "none", "training_type": training_type, "quantizer": ""}
    expected, _ = load_base(model, cache=None, **settings)
    # On a CPU the library does it; the reader can.
    monkeypatch.setattr(direct, "is_wanted", lambda request: True)
    found, details = load_base(model, cache=tmp_path, **settings)
    assert "reader_threads" in details
    same(found.base, expected.base)


def test_nothing_is_made_ready_to_quantize_where_nothing_is_quantized(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full training holds its weights in float32, which no kernel of ours quantizes."""

    def make_ready_as_on_cuda(tables: Any, dtype: torch.dtype) -> None:
        if dtype is torch.float32:
            raise NotNf4("weights in float32 are quantized by the library alone")

    monkeypatch.setattr(direct, "is_wanted", lambda request: True)
    monkeypatch.setattr(direct, "make_ready", make_ready_as_on_cuda)
    _, details = load_base(model, cache=tmp_path / "cache", method="none", training_type="full", quantizer="")
    assert details["read_from"] == "files"


@pytest.mark.parametrize(
    ("device_type", "compute_dtype", "is_ours"),
    [("cuda", "bfloat16", True), ("cuda", "float32", False), ("cpu", "float32", True)],
)
def test_float32_is_quantized_on_cuda_by_the_library_alone(
    device_type: str, compute_dtype: str, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    request = SimpleNamespace(
        device=torch.device(device_type),
        compute_dtype=getattr(torch, compute_dtype),
        quantization=nf4,
        method=qlora,
        quantizer="own",
    )
    assert direct.is_wanted(cast(LoadRequest, request)) is is_ours


@pytest.mark.usefixtures("small_pieces")
def test_stored_types_are_rounded_as_the_library_does(tmp_path: Path) -> None:
    directory = tmp_path / place(tmp_path, TinyOptions())
    path = directory / "model.safetensors"
    for dtype in (torch.float32, torch.float16):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
        expected, _ = load_base(directory, cache=None, quantizer="bitsandbytes")
        found, details = load_base(directory, cache=tmp_path)
        assert "reader_threads" in details
        same(found.base, expected.base)


def test_what_the_files_do_not_hold_tensor_for_tensor_is_the_librarys(tmp_path: Path) -> None:
    """A head beside the embedding that it is tied to: which of the two counts, transformers decides."""
    directory = tmp_path / place(tmp_path, TinyOptions(tied=True))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    expected, _ = load_base(directory, cache=None, quantizer="bitsandbytes")
    found, details = load_base(directory, cache=tmp_path)
    assert details["quantizer"] == "bitsandbytes"
    same(found.base, expected.base)


def test_other_weights_than_the_jobs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsChanged, match="digest"):
        load_base(model, cache=tmp_path / "cache", digest="0" * 64)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_ends_early_names_itself(model: Path, tmp_path: Path) -> None:
    """Between the look at the header and the reading."""
    shard = sorted(model.glob("model-*.safetensors"))[1]
    piece = reader.Piece(file=shard, offset=shard.stat().st_size - 10, num_bytes=64)
    reading = reader.Reading([reader.HashTask(pieces=[piece])], torch.device("cpu"), hashes=True)
    reading.start()
    try:
        with pytest.raises(OSError, match="ends at byte"):
            reading.wait(lambda done: None)
    finally:
        reading.close()
    assert reading.failed_file == shard


def test_a_failure_of_one_thread_ends_all(model: Path) -> None:
    shard = sorted(model.glob("model-*.safetensors"))[0]
    beyond = reader.Piece(file=shard, offset=shard.stat().st_size, num_bytes=64)
    row = [reader.Piece(file=shard, offset=0, num_bytes=64)] * 100_000
    tasks = [reader.HashTask(pieces=row) for _ in range(3)]
    reading = reader.Reading(
        [*tasks, reader.HashTask(pieces=[beyond])], torch.device("cpu"), hashes=True, num_threads=4
    )
    reading.start()
    try:
        with pytest.raises(OSError, match="ends at byte"):
            reading.wait(lambda done: None)
    finally:
        reading.close()


def test_a_stop_ends_the_threads(model: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int) -> None:
        raise Stopped

    shard = sorted(model.glob("model-*.safetensors"))[0]
    tasks = [reader.HashTask(pieces=[reader.Piece(file=shard, offset=0, num_bytes=64)]) for _ in range(1000)]
    reading = reader.Reading(tasks, torch.device("cpu"), hashes=True)
    reading.start()
    with pytest.raises(Stopped):
        reading.wait(stop)
    reading.close()
    assert reading.differing == []
