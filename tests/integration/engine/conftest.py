"""One workspace and one shelf a module: models are made once, and runs follow each other as they do in an engine."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.engine_runs import RunLog, Workspace, read_log

# Read when the libraries are imported, which is later than this.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

RunInProcess = Callable[..., RunLog]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(root=tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run_in_process() -> Iterator[RunInProcess]:
    """Carries out a run directory in this process and gives its log; runs of a module share one shelf."""
    from gpu_service.engine.resident import BaseShelf
    from gpu_service.engine.service import carry_out
    from gpu_service.engine.stopping import StopSwitch

    # As an engine does when it begins to serve.
    gc.freeze()
    shelf = BaseShelf()

    def run(directory: Path, **options: object) -> RunLog:
        arguments: dict[str, object] = {"shelf": shelf, "switch": StopSwitch(), "notify": lambda notice: None}
        carry_out(directory, **{**arguments, **options})  # type: ignore[arg-type]
        return read_log(directory)

    yield run
    gc.unfreeze()
