"""Trainings whose device refuses large passes, as an objective that raises where torch would."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gpu_service.engine.session import Session
from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.objectives import Outcome
from gpu_service.engine.training.objectives.sft import Likelihood
from tests.fakes.engine_runs import RunLog, Workspace


class SmallDevice(Likelihood):
    """Raises as torch does when a pass with gradients holds more than `fits` examples, once it has made `after`."""

    def __init__(self, *, fits: int, after: int = 0) -> None:
        self.passes: list[list[int]] = []
        self._fits = fits
        self._after = after

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        if torch.is_grad_enabled():
            if len(self.passes) >= self._after and len(batch.sources) > self._fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
            self.passes.append(list(batch.tokens_by_example))
        return super().forward(model, batch)


def train(workspace: Workspace, run_in_process: Any, name: str, objective: Any, **options: Any) -> RunLog:
    """What a run with such an objective told; `options` are those of `Workspace.make_run`."""
    directory = workspace.make_run(name, held_out=False, **options)
    log: RunLog = run_in_process(directory, make_session=partial(Session, objective=objective))
    return log
