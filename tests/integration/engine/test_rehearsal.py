"""What a memory probe makes of a plan: its largest evaluation, then its largest step, counted from the start."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from gpu_service.engine import devices
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.request import DeviceChoice, read
from gpu_service.engine.resident import BaseShelf
from gpu_service.engine.run import Run
from gpu_service.engine.session import Session
from gpu_service.engine.stopping import StopSwitch
from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.objectives import Outcome
from gpu_service.engine.training.objectives.sft import Likelihood
from gpu_service.journal import Writer
from tests.fakes.engine_runs import TraitRows, Workspace


class _Recording(Likelihood):
    """Writes down whether a pass has gradients, and its tokens."""

    def __init__(self, log: list[Any]) -> None:
        self._log = log

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        self._log.append(("step" if torch.is_grad_enabled() else "evaluation", batch.num_tokens))
        return super().forward(model, batch)


def _rows(*lengths: int) -> list[dict[str, str]]:
    return [{"prompt": f"{number}", "completion": " x" * length} for number, length in enumerate(lengths)]


def test_the_largest_passes_are_made(
    workspace: Workspace, run_in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    traits = [TraitRows(trait_type="long", rows=_rows(3, 4, 12, 5), held_out=_rows(2, 20, 2, 3))]
    hyperparameters = {"num_steps": 4, "batch": {"examples": 1}}
    log: list[Any] = []
    monkeypatch.setattr(devices.CpuDevice, "start_counting", lambda device: log.append("counting"))
    directory = workspace.make_run("measured", traits=traits, hyperparameters=hyperparameters)
    ran = run_in_process(directory, make_session=partial(Session, objective=_Recording(log)))
    # A run counts from before its first evaluation.
    assert log[0] == "counting"
    assert log.count("counting") == 1
    largest = {kind: max(one for one in log[1:] if one[0] == kind) for kind in ("evaluation", "step")}
    assert largest["evaluation"][1] > largest["step"][1]

    log.clear()
    asked = read(workspace.make_run("probed", traits=traits, hyperparameters=hyperparameters))
    with Writer.open(asked.journal_path, asked.attempt) as writer:
        run = Run(
            request=asked,
            device=devices.select(DeviceChoice(type="cpu")),
            shelf=BaseShelf(),
            switch=StopSwitch(),
            reporter=Reporter(run_directory=directory, writer=writer, notify=lambda notice: None),
            planner_command=(),
            make_session=partial(Session, objective=_Recording(log)),
        )
        run.open_session(workspace.find_plan(ran.of("plan")[0])).rehearse()

    assert log == ["counting", largest["evaluation"], largest["step"], largest["step"]]
