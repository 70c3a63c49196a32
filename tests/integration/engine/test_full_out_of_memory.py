"""Trainings of every weight whose device runs out of memory: what is made in one pass, and what gradients add up in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_service.engine.session import Session
from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.objectives import Outcome
from gpu_service.engine.training.out_of_memory import ADDS_UP_ROUGHLY
from tests.fakes.engine_runs import Workspace
from tests.fakes.small_devices import SmallDevice, train
from tunesmith.common.v1 import errors_pb2


def test_steps_that_must_be_one_pass_are_not_divided(workspace: Workspace, run_in_process: Any) -> None:
    """Where no gradient is kept, several passes would not add up: the run ends, and says of what."""
    values = {"num_steps": 4, "full_memory": "low", "quantization": {"compute_dtype": "bfloat16"}}
    log = train(
        workspace, run_in_process, "low", SmallDevice(fits=1, after=2), training_type="full", hyperparameters=values
    )
    assert log.states == ["RUNNING", "FAILED"]
    assert not log.of("micro_batch_reduced")
    assert sorted(log.losses) == [1, 2]
    assert log.of("run_state")[-1].failure.reason == errors_pb2.ERROR_REASON_DEVICE_OUT_OF_MEMORY


class _LooksAtGradients(SmallDevice):
    """Notes the type of the gradients at every pass that is made."""

    def __init__(self, *, fits: int, after: int = 0, last: int = 0) -> None:
        super().__init__(fits=fits, after=after)
        self.dtypes: list[torch.dtype] = []
        # In float32 there is no room for passes at all.
        self.is_tight = bool(last)

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        if torch.is_grad_enabled() and self.is_tight and model.gradients.flat.dtype is torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        outcome = super().forward(model, batch)
        if torch.is_grad_enabled():
            self.dtypes.append(model.gradients.flat.dtype)
        return outcome


_WHOLE: dict[str, Any] = {
    "training_type": "full",
    "hyperparameters": {
        "num_steps": 4,
        "trainer": "fast",
        "save_every_steps": 3,
        "gradient_checkpointing": False,
        "quantization": {"compute_dtype": "bfloat16"},
    },
}


def test_gradients_of_passes_that_were_made_smaller_add_up_in_float32(
    workspace: Workspace, run_in_process: Any
) -> None:
    """Planned as one pass they are in the compute type; in a run that goes on they are float32 from its start."""
    objective = _LooksAtGradients(fits=2, after=2)
    log = train(workspace, run_in_process, "adds-up", objective, **_WHOLE)
    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert objective.dtypes == [torch.bfloat16] * 2 + [torch.float32] * 4
    checkpoint: Path = workspace.root / "runs/adds-up/1/checkpoints/step-00000003"
    resume = {"checkpoint_directory": str(checkpoint), "checkpoint": checkpoint.name, "step": 3}
    objective = _LooksAtGradients(fits=2)
    log = train(workspace, run_in_process, "adds-up-rest", objective, resume=resume, **_WHOLE)
    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert objective.dtypes == [torch.float32] * 2


def test_gradients_without_room_for_float32_add_up_with_a_warning(workspace: Workspace, run_in_process: Any) -> None:
    objective = _LooksAtGradients(fits=2, after=2, last=1)
    log = train(workspace, run_in_process, "roughly", objective, **_WHOLE)
    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert set(objective.dtypes) == {torch.bfloat16}
    said = [event.message for event in log.of("warning") if event.code == ADDS_UP_ROUGHLY]
    assert ["rounded to torch.bfloat16 as they add up" in message for message in said] == [True]


class _SmallForEvaluations(SmallDevice):
    """Raises at passes without gradients of more than one example; all others have room."""

    def __init__(self) -> None:
        super().__init__(fits=99)

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        if not torch.is_grad_enabled() and len(batch.sources) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return super().forward(model, batch)


def test_smaller_evaluations_leave_steps_that_must_be_one_pass_whole(workspace: Workspace, run_in_process: Any) -> None:
    """In the run that made them smaller, and in one that goes on from its checkpoint."""
    options: dict[str, Any] = {
        "training_type": "full",
        "hyperparameters": {
            "num_steps": 4,
            "save_every_steps": 2,
            "full_memory": "low",
            "quantization": {"compute_dtype": "bfloat16"},
        },
    }
    objective = _SmallForEvaluations()
    directory = workspace.make_run("low-evaluation", **options)
    log = run_in_process(directory, make_session=partial(Session, objective=objective))
    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert [event.limit for event in log.of("micro_batch_reduced")][-1] == 1
    assert [len(one) for one in objective.passes] == [4] * 4

    checkpoint: Path = directory / "checkpoints/step-00000002"
    resume = {"checkpoint_directory": str(checkpoint), "checkpoint": checkpoint.name, "step": 2}
    objective = _SmallForEvaluations()
    rest = workspace.make_run("low-evaluation-rest", resume=resume, **options)
    log = run_in_process(rest, make_session=partial(Session, objective=objective))
    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert [len(one) for one in objective.passes] == [4] * 2
