"""A workspace, and an engine in this process; one of each a module."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.fakes.engine_runs import Workspace
from tests.fakes.generations import InProcessEngine

# Read when the libraries are imported, which is later than this.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and sums are made in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(root=tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="module")
def engine(workspace: Workspace) -> Iterator[InProcessEngine]:
    gc.freeze()
    yield InProcessEngine(workspace)
    gc.unfreeze()
