"""A GPU server with the stub engine for each test; whatever it left is ended afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.gpu_server import GpuServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GpuServer]:
    """Started."""
    made = GpuServer(tmp_path)
    try:
        yield made.start()
    finally:
        made.clean_up()
