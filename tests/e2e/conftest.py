"""The pair with the stub engine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.pair import STUB_ENGINE, PairUnderTest, running_pair
from tests.fakes.tiny_models import place_header_only


@pytest.fixture
def stub_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PairUnderTest]:
    """Both services as processes; the engine is the stub, the base a tiny model of zeros."""
    monkeypatch.setenv("TUNESMITH_GPU_ENGINE_COMMAND", json.dumps(STUB_ENGINE))
    base_model = place_header_only(tmp_path / "models")
    with running_pair(tmp_path / "data", tmp_path / "models", base_model) as pair:
        yield pair
