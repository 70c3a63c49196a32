"""What a new engine does on a GPU before torch is imported, against what torch says of the same device afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

# What another process, or the cache of a kernel, may take between two looks.
_SLACK_BYTES = 64 * 1024 * 1024
_FIND_OUT = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from gpu_service.engine.kernel_facts import find_out
from gpu_service.engine.request import DeviceChoice
find_out(DeviceChoice(type="cuda", index=0))
assert "torch" not in sys.modules
"""


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def test_the_driver_says_of_the_device_what_torch_says() -> None:
    from gpu_service.engine import devices
    from gpu_service.engine.device_facts import open_device
    from gpu_service.engine.request import DeviceChoice

    choice = DeviceChoice(type="cuda", index=0)
    before = open_device(choice)()
    after = devices.select(choice).describe()
    # The context was made by whoever looked first, and is the same.
    assert abs(before.pop("free_memory_bytes") - after.pop("free_memory_bytes")) < _SLACK_BYTES
    assert before == after


def test_this_triton_is_asked_for_everything_ahead() -> None:
    said = subprocess.run(
        [sys.executable, "-c", _FIND_OUT], check=True, stderr=subprocess.PIPE, text=True, timeout=100
    ).stderr
    assert "Triton knows itself" in said
    assert "not found out ahead" not in said


def test_a_first_run_that_is_cancelled_gives_back_what_its_head_start_took(tmp_path: Path) -> None:
    from tests.fakes.engine_process import EngineProcess
    from tests.fakes.engine_runs import Workspace, read_log

    workspace = Workspace(root=tmp_path)
    directory = workspace.make_run("first", device={"type": "cuda", "index": 0}, hyperparameters={"num_steps": 100_000})
    with EngineProcess(tmp_path / "engine.log", device_id="cuda:0") as engine:
        engine.send(type="start_run", run_directory=str(directory))
        engine.wait_phase(directory, "TRAINING")
        engine.send(type="stop_run", run_directory=str(directory), mode="cancel", grace_seconds=30)
        assert engine.wait_finished(directory)["state"] == "CANCELLED"
        # One that another engine's process had to end would say so.
        assert not read_log(directory).of("memory_released")[0].engine_ended
    log = (tmp_path / "engine.log").read_text(errors="replace")
    assert "a planner works for first" in log
