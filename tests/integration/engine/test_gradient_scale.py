"""The loop with a gradient scaler, as float16 has one: what is left out of one step is no trouble to the next."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpu_service.engine.stopping import StopSwitch
from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.objectives import Outcome
from gpu_service.engine.training.progress import TrainingProgress
from tests.fakes.planned_rows import make_examples
from tests.fakes.training_loops import KeptReporter, StepRows, make_loop
from tunesmith.common.v1 import training_spec_pb2

_STEPS = 4
# What the second step's loss is multiplied by.
_LOSS_NOT_FINITE, _GRADIENT_NOT_FINITE = math.nan, math.inf


class _Model(torch.nn.Linear):
    """Stands in for a language model: one weight, and what the loop asks of a model's configuration."""

    class Config:
        _attn_implementation = "sdpa"

    config = Config()

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name


class _Scaling:
    """What accelerate does with a scaler, on a CPU, where it has none."""

    device = torch.device("cpu")

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
        self._optimizer = optimizer

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(self.scaler.scale(loss))

    def clip_grad_norm_(self, parameters: list[torch.Tensor], limit: float) -> torch.Tensor:
        self.scaler.unscale_(self._optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, limit)


class _ScaledOptimizer:
    """accelerate's optimizer, as far as the loop knows it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.accelerator = _Scaling(optimizer)
        self.param_groups = optimizer.param_groups
        self.step_was_skipped = False

    def step(self) -> None:
        before = self.accelerator.scaler.get_scale()
        self.accelerator.scaler.step(self._optimizer)
        self.accelerator.scaler.update()
        self.step_was_skipped = self.accelerator.scaler.get_scale() < before

    def zero_grad(self, *, set_to_none: bool) -> None:
        self._optimizer.zero_grad(set_to_none=set_to_none)


class _Objective:
    """A loss of 1 a token through the weight; in the second step it, or its gradient alone, is not finite."""

    def __init__(self, fault: float) -> None:
        self._fault = fault
        self._num_passes = 0

    def weights(self, batch: MicroBatch) -> tuple[int, ...]:
        return batch.targets_by_example

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        self._num_passes += 1
        total = model.weight.sum() * batch.num_target_tokens
        values = torch.tensor([[float(count)] for count in batch.targets_by_example], dtype=torch.float64)
        if self._num_passes == 2:
            total = total * self._fault
            values = values * math.nan if math.isnan(self._fault) else values
        return Outcome(total=total, values=values)


class _NoCheckpoints:
    def save(self, progress: TrainingProgress) -> None:
        pass


@pytest.mark.parametrize(("fault", "warnings"), [(_LOSS_NOT_FINITE, ["non-finite-loss"]), (_GRADIENT_NOT_FINITE, [])])
def test_a_step_that_is_left_out_does_not_stop_the_next(fault: float, warnings: list[str]) -> None:
    """A loss that is not finite is told; a gradient alone is how the scale is found, and is no news."""
    model = _Model(1, 1, bias=False)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer = _ScaledOptimizer(inner)
    reporter = KeptReporter()
    settings = training_spec_pb2.Hyperparameters(
        optimizer=training_spec_pb2.Optimizer(learning_rate=0.1, max_gradient_norm=1.0),
        schedule=training_spec_pb2.Schedule(name="constant", warmup_steps=0),
        non_finite_policy="skip",
    )
    rows = StepRows(make_examples([9] * _STEPS, vocabulary_size=9, seed=0), examples_per_step=1)
    loop = make_loop(
        accelerator=optimizer.accelerator,
        model=model,
        optimizer=optimizer,
        data=rows.as_data(),
        settings=settings,
        objective=_Objective(fault),
        checkpoints=_NoCheckpoints(),
        reporter=reporter,
        switch=StopSwitch(),
    )
    assert not loop.run()

    assert [event.skipped for event in reporter.steps] == [False, True, False, False]
    assert reporter.warnings == warnings
    assert loop.progress.steps_done == _STEPS
    assert loop.progress.num_examples == _STEPS
    # The optimizer counted three updates, and the scale was halved once.
    assert inner.state[model.weight]["step"] == 3
    assert optimizer.accelerator.scaler.get_scale() == 32.0
    assert math.isfinite(model.weight.item())
