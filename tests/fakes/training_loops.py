"""Training loops without files or libraries: what they are made of, one over a tiny model, and all that they said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.domain.planned_data import Example, ExampleReference, PlannedData
from gpu_service.engine.devices import CpuDevice
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.stopping import StopSwitch
from gpu_service.engine.training.batches import MicroBatch, MicroBatchLimit
from gpu_service.engine.training.loop import TrainingLoop
from gpu_service.engine.training.objectives import Outcome
from gpu_service.engine.training.out_of_memory import PassSize
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.engine.training.updates import UpdatesOnDevice, UpdatesOnHost
from tests.fakes.fast_models import make_fast, make_peft
from tests.fakes.flat_models import VOCABULARY_SIZE
from tests.fakes.planned_rows import PlannedRows, make_examples
from tunesmith.common.v1 import event_pb2, training_spec_pb2

CPU = torch.device("cpu")
SETTINGS = training_spec_pb2.Optimizer(
    learning_rate=1e-2, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.01, max_gradient_norm=1.0
)
NUM_STEPS = 6


class StandInAccelerator:
    """What the loop asks of accelerate where nothing is scaled."""

    device = CPU
    scaler = None

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)

    def clip_grad_norm_(self, parameters: list[torch.Tensor], limit: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)


class SpoiledLikelihood:
    """Likelihood; the passes of some steps, counted from 1, are spoiled."""

    def __init__(self, spoiled: dict[int, float]) -> None:
        self._spoiled = spoiled
        self.num_passes = 0

    def weights(self, batch: MicroBatch) -> tuple[int, ...]:
        return batch.targets_by_example

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        self.num_passes += 1
        found = model.nats_by_sequence(batch)
        total = found.sum() * self._spoiled.get(self.num_passes, 1.0)
        is_lost = math.isnan(self._spoiled.get(self.num_passes, 1.0))
        return Outcome(total=total, values=(found * math.nan if is_lost else found).detach()[:, None])


class KeptReporter:
    def __init__(self) -> None:
        self.said: list[Any] = []
        self.warnings: list[str] = []

    def emit(self, message: Any) -> None:
        self.said.append(message)

    def warn(self, code: str, message: str, **about: Any) -> None:
        self.said.append(code)
        self.warnings.append(code)

    def enter_phase(self, name: str) -> None:
        self.said.append(name)

    def enter_stopping(self) -> None:
        self.said.append("STOPPING")

    @property
    def steps(self) -> list[event_pb2.StepEvent]:
        return [one for one in self.said if isinstance(one, event_pb2.StepEvent)]


class KeptCheckpoints:
    """Remembers the weights of every save, and after how many steps."""

    def __init__(self) -> None:
        self.model: Any = None
        self.saved: dict[int, torch.Tensor] = {}

    def save(self, progress: TrainingProgress) -> None:
        self.saved[progress.steps_done] = self.model.adapter.detach().clone()

    def tell_lost_steps(self, progress: TrainingProgress) -> None:
        assert progress.steps_done in self.saved


class StepRows(PlannedRows):
    """So many examples a step, each shown once."""

    def __init__(self, rows: Sequence[Example], *, examples_per_step: int) -> None:
        super().__init__(rows)
        self._examples_per_step = examples_per_step
        self.num_steps = len(rows) // examples_per_step

    def step_examples(self, step: int) -> list[ExampleReference]:
        start = step * self._examples_per_step
        return self.references[start : start + self._examples_per_step]

    def epoch_of_step(self, step: int) -> float:
        return step / self.num_steps


def make_loop(
    *,
    accelerator: Any,
    model: Any,
    optimizer: Any,
    data: PlannedData,
    settings: training_spec_pb2.Hyperparameters,
    objective: Any,
    checkpoints: Any,
    reporter: Any,
    switch: StopSwitch,
) -> TrainingLoop:
    """A loop on the CPU from the first step on, whose passes hold all that a step has."""
    device, progress = CpuDevice(DeviceChoice(type="cpu", index=-1)), TrainingProgress()
    return TrainingLoop(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        data=data,
        settings=settings,
        objective=objective,
        pass_size=PassSize(planned=MicroBatchLimit(), data=data, device=device, reporter=reporter, progress=progress),
        examples_per_epoch=data.num_steps,
        checkpoints=checkpoints,
        progress=progress,
        device=device,
        switch=switch,
        reporter=reporter,
        evaluate=lambda: None,
    )


@dataclass(kw_only=True)
class LoopTraining:
    loop: TrainingLoop
    reporter: KeptReporter
    checkpoints: KeptCheckpoints
    objective: SpoiledLikelihood
    model: Any
    optimizer: FlatAdamW
    switch: StopSwitch

    @property
    def numbers(self) -> list[tuple[Any, ...]]:
        """What events say but for time and memory."""
        return [
            (one.step, one.loss, one.HasField("loss"), one.gradient_norm, one.learning_rate, one.skipped, one.epoch,
             [value.SerializeToString() for value in one.dataset_losses], one.num_tokens)
            for one in self.reporter.steps
        ]  # fmt: skip


def make_training(
    *, on_device: bool, policy: str = "skip", spoiled: dict[int, float] | None = None, save_every: int = 0
) -> LoopTraining:
    """`spoiled` are factors of the losses of some passes, counted from 1; a loss times NaN is itself lost."""
    model = make_fast(make_peft())
    optimizer = FlatAdamW(model.flat_adapter, SETTINGS)
    reporter, checkpoints, objective, switch = (
        KeptReporter(),
        KeptCheckpoints(),
        SpoiledLikelihood(spoiled or {}),
        StopSwitch(),
    )
    checkpoints.model = model
    examples = make_examples([9, 17] * NUM_STEPS, vocabulary_size=VOCABULARY_SIZE, seed=0)
    loop = make_loop(
        accelerator=StandInAccelerator(),
        model=model,
        optimizer=optimizer,
        data=StepRows(examples, examples_per_step=2).as_data(),
        settings=training_spec_pb2.Hyperparameters(
            optimizer=SETTINGS,
            schedule=training_spec_pb2.Schedule(name="linear", warmup_steps=1),
            non_finite_policy=policy,
            save_every_steps=save_every,
        ),
        objective=objective,
        checkpoints=checkpoints,
        reporter=reporter,
        switch=switch,
    )
    if on_device:
        loop._updates = UpdatesOnDevice(optimizer=optimizer, inner=optimizer, device=CPU, halts=policy == "stop")
    else:
        assert isinstance(loop._updates, UpdatesOnHost)
    return LoopTraining(
        loop=loop, reporter=reporter, checkpoints=checkpoints, objective=objective, model=model, optimizer=optimizer,
        switch=switch,
    )  # fmt: skip


def words_of(training: LoopTraining) -> list[str]:
    """Codes, phases and steps, in the order in which they were said."""
    return [one if isinstance(one, str) else f"step {one.step}" for one in training.reporter.said]
