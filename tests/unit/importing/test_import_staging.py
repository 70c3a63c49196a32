"""A model appears under its name whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_service.engine.importing.errors import ImportRefused, Reason
from gpu_service.engine.importing.staging import ModelName, staged

NAME = ModelName("org", "model")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model",
        "a/b/c",
        "../b",
        "a/..",
        "a/b..c",
        "/b",
        "a/",
        ".a/b",
        "a/.b",
        "-a/b",
        "a b/c",
        "a/b\n",
        "é/b",
        "a\\b/c",
    ],
)
def test_names_that_are_not_organization_and_model_are_refused(text: str) -> None:
    with pytest.raises(ImportRefused) as caught:
        ModelName.parse(text)
    assert caught.value.reason is Reason.INVALID_NAME


def test_usual_names_are_accepted() -> None:
    for text in ("HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.2-3B", "01-ai/Yi_9B"):
        assert str(ModelName.parse(text)) == text


def test_the_model_appears_only_at_the_end(tmp_path: Path) -> None:
    with staged(tmp_path, NAME, replace=False) as work:
        (work / "config.json").write_text("{}")
        assert not (tmp_path / "org/model").exists()
        assert work.name.startswith(".")
    assert (tmp_path / "org/model/config.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "org").iterdir()] == ["model"]
    assert (tmp_path / "org/model").stat().st_mode & 0o777 == 0o755


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def import_and_fail() -> None:
        with staged(tmp_path, NAME, replace=False) as work:
            (work / "config.json").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        import_and_fail()
    assert list((tmp_path / "org").iterdir()) == []


def test_a_taken_name_is_refused_before_any_work(tmp_path: Path) -> None:
    _write_model(tmp_path, "old")
    with pytest.raises(ImportRefused) as caught, staged(tmp_path, NAME, replace=False):
        pytest.fail("the work began")
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert _read_model(tmp_path) == "old"


def test_of_two_imports_of_one_name_the_second_to_finish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused) as caught, staged(tmp_path, NAME, replace=False):
        _write_model(tmp_path, "first")
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert _read_model(tmp_path) == "first"


def test_replace_exchanges_the_whole_directory(tmp_path: Path) -> None:
    _write_model(tmp_path, "old")
    (tmp_path / "org/model/only-in-the-old").touch()
    with staged(tmp_path, NAME, replace=True) as work:
        (work / "config.json").write_text("new")
    assert _read_model(tmp_path) == "new"
    assert [path.name for path in (tmp_path / "org/model").iterdir()] == ["config.json"]
    assert [path.name for path in (tmp_path / "org").iterdir()] == ["model"]


def test_a_failed_replacement_keeps_the_old_model(tmp_path: Path) -> None:
    _write_model(tmp_path, "old")
    with pytest.raises(ZeroDivisionError), staged(tmp_path, NAME, replace=True):
        raise ZeroDivisionError
    assert _read_model(tmp_path) == "old"


def test_a_models_directory_that_cannot_be_made_is_a_typed_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImportRefused) as caught, staged(tmp_path / "file", NAME, replace=False):
        pytest.fail("the work began")
    assert caught.value.reason is Reason.STORAGE_FAILED


def _write_model(models: Path, text: str) -> None:
    (models / "org/model").mkdir(parents=True, exist_ok=True)
    (models / "org/model/config.json").write_text(text)


def _read_model(models: Path) -> str:
    return (models / "org/model/config.json").read_text()
