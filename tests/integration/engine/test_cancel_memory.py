"""A cancelled run whose memory does not come back is not called cancelled by its engine, which ends instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gpu_service.engine.ending import Outcome
from gpu_service.engine.resident import BaseShelf, held_bytes
from gpu_service.engine.service import carry_out
from gpu_service.engine.stopping import StopMode, StopSwitch
from tests.fakes.engine_runs import RunLog, Workspace, read_log

_LEAK_BYTES = 200 * 1024 * 1024


def _cancel(workspace: Workspace, job_id: str, leak: list[Any], **options: Any) -> tuple[Outcome, RunLog, list[str]]:
    directory = workspace.make_run(job_id, hyperparameters={"num_steps": 1000})
    switch = StopSwitch()
    done: list[str] = []

    def notify(notice: dict[str, Any]) -> None:
        if notice.get("phase") == "TRAINING":
            leak.append(torch.ones(options.get("leak_bytes", 0), dtype=torch.uint8))
            switch.request(StopMode.CANCEL)

    def clear(run_directory: Path) -> bool:
        done.append(read_log(run_directory).states[-1])
        return bool(options.get("cleared", True))

    outcome = carry_out(
        directory,
        shelf=BaseShelf(),
        switch=switch,
        notify=notify,
        clear=clear,
    )
    return outcome, read_log(directory), done


def test_memory_that_stays_ends_the_engine_without_a_word(workspace: Workspace) -> None:
    kept: list[Any] = []
    outcome, log, cleared = _cancel(workspace, "kept", kept, leak_bytes=_LEAK_BYTES)
    assert (outcome.is_told, outcome.ends_engine) == (False, True)
    assert log.states == ["RUNNING", "STOPPING"]
    assert not log.of("memory_released")
    assert cleared == ["STOPPING"]


def test_memory_that_comes_back_is_told_once_nothing_of_the_run_is_left(workspace: Workspace) -> None:
    outcome, log, cleared = _cancel(workspace, "given-back", [])
    assert (outcome.is_told, outcome.ends_engine) == (True, False)
    assert log.states == ["RUNNING", "STOPPING", "CANCELLED"]
    # Asked for before the outcome was written.
    assert cleared == ["STOPPING"]


def test_what_nobody_could_clear_is_not_called_cancelled(workspace: Workspace) -> None:
    outcome, log, _ = _cancel(workspace, "alone", [], cleared=False)
    assert (outcome.is_told, outcome.ends_engine) == (False, True)
    assert log.states == ["RUNNING", "STOPPING"]


def test_a_models_memory_has_what_a_quantization_keeps_beside_the_weights() -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    weight = model.weight.numel() * 4
    assert held_bytes(model) == weight
    model.tied = model.weight
    assert held_bytes(model) == weight

    class State:
        absmax = torch.ones(10)
        state2 = type("Second", (), {"absmax": torch.ones(3)})()

    model.weight.quant_state = State()  # type: ignore[attr-defined]
    assert held_bytes(model) == weight + 40 + 12
