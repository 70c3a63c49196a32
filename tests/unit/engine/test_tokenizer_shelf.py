"""Which tokenizer is used again, and as what."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu_service.engine.tokenizer_shelf import TokenizerShelf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "org" / "model"
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_the_same_files_give_it_back_as_it_was_read(model: Path) -> None:
    shelf, tokenizer = TokenizerShelf(), SimpleNamespace(chat_template="its own")
    assert shelf.find(model) is None
    shelf.put(model, tokenizer)
    tokenizer.chat_template = "that of a plan"
    assert shelf.find(model) is tokenizer
    assert tokenizer.chat_template == "its own"


def test_other_files_do_not(model: Path) -> None:
    shelf = TokenizerShelf()
    shelf.put(model, SimpleNamespace(chat_template=None))
    assert shelf.find(model.with_name("other")) is None
    (model / "added_tokens.json").write_text("{}")
    assert shelf.find(model) is None


def test_nothing_is_left_of_what_was_cleared(model: Path) -> None:
    shelf = TokenizerShelf()
    shelf.put(model, SimpleNamespace(chat_template=None))
    shelf.clear()
    assert shelf.find(model) is None
