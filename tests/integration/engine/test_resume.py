"""An interrupted training and an uninterrupted one are the same to the last bit, wherever it was interrupted."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.engine_runs import RunLog, Workspace

# Thirty-two examples, four a step: three epochs.
_NUM_STEPS = 24
_STEPS_PER_EPOCH = 8
_NUM_RESUMED = 20
_METHODS: dict[str, dict[str, Any]] = {
    # Dropout draws from the generators whose state is kept.
    "qlora": {"lora": {"rank": 4, "dropout": 0.2}},
    "lora": {"lora": {"rank": 4, "dropout": 0.2}},
    "full": {"optimizer": {"learning_rate": 1e-3}},
    # Matrices of 4,096 elements and more have their moments in 8 bits.
    "full-adamw-8bit": {"optimizer": {"name": "adamw-8bit", "learning_rate": 1e-3}},
}
# What a training is made of; the trainer's own file has seconds in it.
_STATE_FILES = {"weights.safetensors", "optimizer.safetensors", "optimizer.json", "random.safetensors"}


def _hyperparameters(method: str) -> dict[str, Any]:
    return {"num_steps": _NUM_STEPS, "save_every_steps": 1, "keep_checkpoints": 1000, **_METHODS[method]}


def _planned(log: RunLog, workspace: Workspace) -> list[str]:
    """A planner that gives the plan of an earlier run at once."""
    (plan,) = log.of("plan")
    answer = json.dumps({"type": "planned", "plan_directory": str(workspace.find_plan(plan.data_digest))})
    return [sys.executable, "-S", "-c", f"print({answer!r})"]


def _state_of(run: Path, step: int) -> dict[str, str]:
    manifest = json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())
    return {file["path"]: file["sha256"] for file in manifest["files"] if file["path"] in _STATE_FILES}


@pytest.mark.parametrize("method", _METHODS)
def test_any_step_can_be_gone_on_from(method: str, workspace: Workspace, run_in_process: Callable[..., RunLog]) -> None:
    """Twenty steps drawn by a seed, each gone on from with everything made anew."""
    from gpu_service.engine.resident import BaseShelf

    training_type = method.partition("-")[0]
    hyperparameters = _hyperparameters(method)
    whole = workspace.make_run(method, training_type=training_type, hyperparameters=hyperparameters)
    uninterrupted = run_in_process(whole)
    assert uninterrupted.states[-1] == "SUCCEEDED", uninterrupted.payloads[-1]
    planner = _planned(uninterrupted, workspace)
    steps = sorted(random.Random(7).sample(range(1, _NUM_STEPS), _NUM_RESUMED))
    assert any(step > _STEPS_PER_EPOCH and step % _STEPS_PER_EPOCH for step in steps)

    for attempt, step in enumerate(steps, start=2):
        rest = workspace.make_run(
            method,
            training_type=training_type,
            hyperparameters=hyperparameters,
            attempt=attempt,
            resume=workspace.resume_point(whole, step),
        )
        resumed = run_in_process(rest, planner_command=planner, shelf=BaseShelf())
        (event,) = resumed.of("resumed")
        assert event.saved_probe_loss == event.measured_probe_loss
        assert resumed.losses == {n: loss for n, loss in uninterrupted.losses.items() if n > step}
        assert _state_of(rest, _NUM_STEPS) == _state_of(whole, _NUM_STEPS)
