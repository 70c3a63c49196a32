"""A tokenizer that a plan asks for no token is not read, once its special tokens are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_service.catalog.tokenizer_files import read_tokenizer_facts
from gpu_service.planner import tokenizer_source
from gpu_service.planner.rendering import Rendered
from gpu_service.planner.tokenizer import TextTokenizer
from gpu_service.planner.tokenizer_source import TokenizerSource, load_source
from tests.fakes.tiny_models import TinyOptions, place_header_only


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / place_header_only(tmp_path, TinyOptions(adds_bos=True))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories whose tokenizer was read."""
    found: list[Path] = []
    real = tokenizer_source._load

    def load(directory: Path) -> Any:
        found.append(directory)
        return real(directory)

    monkeypatch.setattr(tokenizer_source, "_load", load)
    return found


def source(model: Path, cache: Path, *, keeps_ids: bool = True) -> TokenizerSource:
    facts = read_tokenizer_facts(model)
    return load_source(model, facts, config_type="llama", cache_directory=cache, keeps_ids=keeps_ids)


def test_it_is_read_once_and_then_when_a_text_comes(model: Path, tmp_path: Path, reads: list[Path]) -> None:
    first = TextTokenizer(source(model, tmp_path / "cache"), {})
    assert reads == [model]
    rendered = Rendered(text="the quick", targets=[(4, 9)], is_document=True)
    encoded = first.encode([rendered], loss_on_all=False, max_length=99)

    second = TextTokenizer(source(model, tmp_path / "cache"), {})
    assert second.end_token_id == first.end_token_id is not None
    assert reads == [model]
    assert second.encode([rendered], loss_on_all=False, max_length=99) == encoded
    assert reads == [model, model]


def test_nothing_is_kept_unless_it_is_asked_for(model: Path, tmp_path: Path, reads: list[Path]) -> None:
    for _ in range(2):
        source(model, tmp_path / "cache", keeps_ids=False)
    assert len(reads) == 2
    assert not (tmp_path / "cache").exists()


def test_other_files_are_read_again(model: Path, tmp_path: Path, reads: list[Path]) -> None:
    source(model, tmp_path / "cache")
    (model / "generation_config.json").write_text("{}")
    source(model, tmp_path / "cache")
    assert len(reads) == 2


def test_ids_that_cannot_be_read_cost_time_only(model: Path, tmp_path: Path, reads: list[Path]) -> None:
    ids = source(model, tmp_path / "cache").special_ids
    (path,) = (tmp_path / "cache/tokenizers").iterdir()
    path.write_text("[")
    assert source(model, tmp_path / "cache").special_ids == ids
    assert len(reads) == 2
