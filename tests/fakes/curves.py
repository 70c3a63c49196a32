"""The same run by the fast path and by transformers and PEFT, through planner and engine, loss by loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_service.engine.resident import BaseShelf
from gpu_service.engine.service import carry_out
from gpu_service.engine.stopping import StopSwitch
from tests.fakes.engine_runs import RunLog, Workspace, read_log

NUM_STEPS = 200
_LAST_STEPS = 20
# In nats a target token, on average over all steps; and of the mean of the last ones, a part.
_MEAN_APART, _END_APART = 0.005, 0.005


def train_by_both(
    workspace: Workspace, *, training_type: str, device: dict[str, Any], compute_dtype: str
) -> list[Path]:
    """Directories of a run of NUM_STEPS steps by the fast path, and of one by the plain path."""
    shelf, directories = BaseShelf(), []
    for trainer in ("fast", "reference"):
        directory = workspace.make_run(
            f"curve-{training_type}-{compute_dtype}-{trainer}",
            training_type=training_type,
            device=device,
            hyperparameters={
                "num_steps": NUM_STEPS,
                "trainer": trainer,
                "optimizer": {"learning_rate": 1e-3},
                "quantization": {"compute_dtype": compute_dtype},
            },
        )
        carry_out(directory, shelf=shelf, switch=StopSwitch(), notify=lambda notice: None)
        directories.append(directory)
    return directories


def hold_same_curve(fast: RunLog, plain: RunLog) -> None:
    """Both learned, and lay beside each other all the way and at the end."""
    for log in (fast, plain):
        assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    steps = range(1, NUM_STEPS + 1)
    apart = [abs(fast.losses[step] - plain.losses[step]) for step in steps]
    assert sum(apart) / NUM_STEPS <= _MEAN_APART
    ends = [sum(log.losses[step] for step in steps[-_LAST_STEPS:]) for log in (fast, plain)]
    assert abs(ends[0] / ends[1] - 1) <= _END_APART
    assert plain.losses[NUM_STEPS] < plain.losses[1] - 0.1


def read_both(directories: list[Path]) -> tuple[RunLog, RunLog]:
    """Their logs."""
    fast, plain = map(read_log, directories)
    return fast, plain
