"""The library's way of loading: files that the node knows are not hashed again, and any other is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gpu_service.catalog import known_files
from gpu_service.catalog.weight_files import CACHE_FILE, weights_digest
from gpu_service.engine.loading import weights
from tests.fakes.base_loading import load_base, same
from tests.fakes.tiny_models import TinyOptions, place


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are as if they had been there for long."""
    monkeypatch.setattr(known_files, "UNSETTLED_SECONDS", -10)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / place(tmp_path, TinyOptions(sharded=True))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were read from front to back."""
    seen: list[str] = []
    read = weights._read

    def note(path: Path, *rest: Any) -> int:
        seen.append(path.name)
        return read(path, *rest)

    monkeypatch.setattr(weights, "_read", note)
    return seen


def test_files_that_the_node_knows_are_not_hashed_again(model: Path, tmp_path: Path, hashed: list[str]) -> None:
    cache = tmp_path / "cache"
    expected, details = load_base(model, cache=None, quantizer="bitsandbytes")
    shards = list(hashed)
    assert len(shards) > 1
    assert details["verified_by"] == "whole"
    digest = weights_digest(model, cache / CACHE_FILE)
    hashed.clear()

    found, details = load_base(model, cache=cache, quantizer="bitsandbytes", digest=digest)
    assert details["verified_by"] == "identity"
    assert hashed == []
    same(found.base, expected.base)

    # The same bytes, but who says so?
    shard = model / shards[0]
    shard.write_bytes(shard.read_bytes())
    _, details = load_base(model, cache=cache, quantizer="bitsandbytes", digest=digest)
    assert details["verified_by"] == "whole"
    assert hashed == shards


def test_a_file_that_was_changed_is_not_what_the_job_is_for(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    digest = weights_digest(model, cache / CACHE_FILE)
    shard = sorted(model.glob("model-*.safetensors"))[0]
    before = shard.stat()
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard)
    # As if nothing had happened.
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(weights.WeightsChanged):
        load_base(model, cache=cache, quantizer="bitsandbytes", digest=digest)


def test_a_file_that_changes_meanwhile_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    digest = weights_digest(model, cache / CACHE_FILE)
    read_ahead = weights._read_ahead

    def touch_behind(path: Path) -> int:
        num_bytes = read_ahead(path)
        os.utime(path)
        return num_bytes

    monkeypatch.setattr(weights, "_read_ahead", touch_behind)
    with pytest.raises(weights.WeightsChanged, match="while it was read"):
        load_base(model, cache=cache, quantizer="bitsandbytes", digest=digest)


def test_without_a_digest_files_are_read_as_they_are(model: Path, tmp_path: Path) -> None:
    weights_digest(model, tmp_path / "cache" / CACHE_FILE)
    _, details = load_base(model, cache=tmp_path / "cache", quantizer="bitsandbytes", digest="")
    assert details["verified_by"] == "nothing"
