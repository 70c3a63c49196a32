"""What makes a start warm: an engine that is ready before its first run, and what runs leave each other."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.engine import devices, warm_up
from gpu_service.engine.failures import LoadFailure
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.resident import BaseShelf
from gpu_service.engine.spare_planner import SparePlanner
from tests.fakes.engine_runs import RunLog, Workspace
from tests.fakes.tiny_models import CHAT_TEMPLATE, TinyOptions
from tunesmith.common.v1 import errors_pb2

pytestmark = pytest.mark.timeout(240)

RunInProcess = Callable[..., RunLog]


def test_a_warm_up_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger=warm_up.__name__)
    warm_up.make_ready("cpu:-1", lambda: False)
    assert "warm after" in caplog.text
    held = devices.select(DeviceChoice(type="cpu")).held_bytes()
    warm_up.make_ready("cpu:-1", lambda: False)
    # As the contract has it for a cancelled run.
    assert devices.select(DeviceChoice(type="cpu")).held_bytes() - held < 64 * 1024 * 1024


def test_a_warm_up_gives_way_to_a_run_wherever_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger=warm_up.__name__)
    asked = 0

    def is_wanted() -> bool:
        nonlocal asked
        asked += 1
        return asked > limit

    for limit in (0, 1, 5, 12):
        asked = 0
        warm_up.make_ready("cpu:-1", is_wanted)
        # Once it was told, it asks no more.
        assert asked == limit + 1
    assert caplog.text.count("left for a run") == 4


def test_a_device_without_memory_ends_the_warm_up_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(warm_up, "_step", refuse)
    warm_up.make_ready("cpu:-1", lambda: False)
    assert "no memory: none left" in caplog.text


@pytest.mark.parametrize("part", ["_write_model", "_step", "load"])
def test_what_fails_in_a_warm_up_is_left_to_runs(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk without room for the small model, or a kernel that cannot be compiled, ends no engine."""
    caplog.set_level("INFO", logger=warm_up.__name__)
    errors = {
        "_write_model": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "_step": RuntimeError("Failed to find C compiler"),
        "load": LoadFailure(errors_pb2.Failure(message="no kernels")),
    }

    def refuse(*arguments: Any, **options: Any) -> None:
        raise errors[part]

    monkeypatch.setattr(warm_up, part, refuse)
    warm_up.make_ready("cpu:-1", lambda: False)
    assert "warm-up was not finished" in caplog.text
    assert "warm after" not in caplog.text


def test_an_older_gpu_compiles_no_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger=warm_up.__name__)
    trained: list[Any] = []
    monkeypatch.setattr(warm_up, "_train", lambda *arguments: trained.append(arguments))
    for capability in ("7.5", "8.0"):
        told = {"type": "cuda", "name": "a card", "compute_capability": capability}
        monkeypatch.setattr(devices.CpuDevice, "describe", lambda device, told=told: told)
        warm_up.make_ready("cpu:-1", lambda: False)
    assert len(trained) == 1
    assert caplog.text.count("warm after") == 2


def test_kernels_are_compiled_for_the_sizes_of_a_model(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers of the model's sizes are trained, and nothing of the model but its config is read."""
    caplog.set_level("INFO", logger=warm_up.__name__)
    seen: list[dict[str, tuple[int, ...]]] = []
    step = warm_up._step

    def look(model: Any, *rest: Any) -> None:
        seen.append({name: tuple(value.shape) for name, value in model.named_parameters()})
        step(model, *rest)

    monkeypatch.setattr(warm_up, "_step", look)
    device = devices.select(DeviceChoice(type="cpu", index=-1))
    directory = tmp_path / "model"
    directory.mkdir()
    source = workspace.models_directory / workspace.place_model(TinyOptions(family="qwen2"))
    shutil.copyfile(source / "config.json", directory / "config.json")
    warm_up._train_alike(directory, device, warm_up._Pace(is_wanted=lambda: False))
    (shapes,) = seen
    assert shapes["base_model.model.model.embed_tokens.weight"] == (512, 64)
    assert shapes["base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"] == (128, 16)
    assert any("layers.1." in name for name in shapes)
    (directory / "config.json").write_text('{"model_type": "phi3"}')
    warm_up._train_alike(directory, device, warm_up._Pace(is_wanted=lambda: False))
    assert len(seen) == 1
    assert "no kernels are compiled for model" in caplog.text


def test_a_warm_up_changes_no_run(workspace: Workspace, run_in_process: RunInProcess) -> None:
    before = run_in_process(workspace.make_run("before"), shelf=BaseShelf())
    warm_up.make_ready("cpu:-1", lambda: False)
    after = run_in_process(workspace.make_run("after"), shelf=BaseShelf())
    assert before.losses == after.losses


def test_the_next_run_finds_the_tokenizer_and_its_own_template(
    workspace: Workspace, run_in_process: RunInProcess
) -> None:
    shelf = BaseShelf()
    named = {"chat_template": "chatml"}
    runs = [
        run_in_process(workspace.make_run("first", hyperparameters=named), shelf=shelf),
        run_in_process(workspace.make_run("second"), shelf=shelf),
        run_in_process(workspace.make_run("third", hyperparameters={"lora": {"rank": 8}}), shelf=shelf),
    ]
    assert ["resident" in log.stage_details("TOKENIZER") for log in runs] == [False, True, True]
    directories = [workspace.root / "runs" / name / "1" for name in ("first", "second")]
    templates = [(directory / "artifacts/adapter/chat_template.jinja").read_text() for directory in directories]
    assert templates[0] != templates[1]
    assert templates[1] == CHAT_TEMPLATE


def test_a_tokenizer_that_was_read_ahead_is_the_runs(
    workspace: Workspace, run_in_process: RunInProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = workspace.make_run("ahead")
    shelf = BaseShelf()
    warm_up.read_tokenizer(workspace.models_directory / "tiny/llama", shelf.tokenizers)
    log = run_in_process(directory, shelf=shelf)
    assert log.states[-1] == "SUCCEEDED"
    assert "resident" in log.stage_details("TOKENIZER")
    # What cannot be read is nobody's trouble before a run wants it.
    caplog.set_level("INFO", logger=warm_up.__name__)
    warm_up.read_tokenizer(tmp_path, BaseShelf().tokenizers)
    assert "no tokenizer was read ahead" in caplog.text


def test_a_run_is_planned_by_the_planner_that_waits(workspace: Workspace, run_in_process: RunInProcess) -> None:
    planner = SparePlanner()
    planner.prepare()
    log = run_in_process(workspace.make_run("planned"), spare_planner=planner, planner_command=("no-such-program",))
    assert log.states[-1] == "SUCCEEDED"
    assert planner.pid is None
    planner.close()
