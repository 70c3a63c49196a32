"""The command's contract: exit codes, one JSON line, and no library loaded for a copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_service.engine.importing.__main__ import main
from tests.unit.importing.directories import write_model


def _arguments(tmp_path: Path, *more: str) -> list[str]:
    return ["--models-directory", str(tmp_path / "models"), "--name", "org/model", *more]


def test_a_directory_becomes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "source")
    assert main(_arguments(tmp_path, "--directory", str(source))) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "org/model"
    assert result["num_parameters"] == 10
    assert len(result["weights_digest"]) == 64
    assert (Path(result["path"]) / "model.safetensors").exists()
    assert not list((tmp_path / "models").rglob(".*"))


def test_a_refusal_is_one_line_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_arguments(tmp_path, "--directory", str(tmp_path / "absent"))) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert json.loads(line)["reason"] == "SOURCE_NOT_FOUND"
    assert not (tmp_path / "models/org/model").exists()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--gguf", "a", "--directory", "b"],
        ["--directory", "a", "--revision", "main"],
        ["--gguf", "a", "--token-file", "b"],
        ["--directory", "a", "--sha256", "00"],
        ["--hub-id", "a/b", "--dtype", "float32"],
        ["--gguf", "a", "--dtype", "int8"],
    ],
)
def test_wrong_usage_exits_with_two(tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(_arguments(tmp_path, *more))
    assert caught.value.code == 2


def test_a_file_of_another_digest_is_refused_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert main(_arguments(tmp_path, "--gguf", str(tmp_path / "m.gguf"), "--sha256", "00" * 32)) == 1
    assert json.loads(capsys.readouterr().err)["reason"] == "CHECKSUM_MISMATCH"


def test_a_copy_loads_no_training_library(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    program = (
        "import sys; from gpu_service.engine.importing.__main__ import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *_arguments(tmp_path, "--directory", str(source))],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
