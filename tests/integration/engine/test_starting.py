"""A run that starts from an earlier one has its weights, a fresh optimizer and step 0; what does not fit, fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes.engine_runs import RunLog, Workspace
from tunesmith.common.v1 import errors_pb2

_STEPS: dict[str, Any] = {"num_steps": 3, "save_every_steps": 0}


@pytest.mark.parametrize(
    ("training_type", "left"),
    [("qlora", "artifacts/adapter"), ("lora", "checkpoints/step-00000003"), ("full", "artifacts/model")],
)
def test_begins_where_the_earlier_run_ended(
    training_type: str, left: str, workspace: Workspace, run_in_process: Any
) -> None:
    earlier = workspace.make_run(f"{training_type}-earlier", training_type=training_type, hyperparameters=_STEPS)
    before: RunLog = run_in_process(earlier)
    later = workspace.make_run(
        f"{training_type}-later", training_type=training_type, hyperparameters=_STEPS, start=earlier / left
    )
    after: RunLog = run_in_process(later)

    assert after.states[-1] == "SUCCEEDED"
    assert after.of("evaluation")[0].loss == before.of("evaluation")[-1].loss
    assert after.of("evaluation")[-1].loss < after.of("evaluation")[0].loss
    assert list(after.losses) == [1, 2, 3]
    # Warm-up begins anew, and so does Adam.
    assert [event.learning_rate for event in after.of("step")] == [event.learning_rate for event in before.of("step")]
    stage = "WEIGHTS" if training_type == "full" else "ADAPTER"
    assert after.stage_details(stage)["start_from"] == Path(left).name
    kind = "model" if training_type == "full" else "adapter"
    assert "of job `earlier`" in (later / f"artifacts/{kind}/README.md").read_text()


def test_another_rank_fails_with_both(workspace: Workspace, run_in_process: Any) -> None:
    """The plan refuses this where it is told of the earlier job; the loading stage looks at the tensors themselves."""
    earlier = workspace.make_run("rank-4", hyperparameters=_STEPS)
    run_in_process(earlier)
    later = workspace.make_run(
        "rank-8", hyperparameters=_STEPS | {"lora": {"rank": 8}}, start=earlier / "artifacts/adapter"
    )
    failure = run_in_process(later).of("run_state")[-1].failure

    assert failure.reason == errors_pb2.ERROR_REASON_LOAD_ADAPTER
    assert failure.file == "start/adapter_model.safetensors"
    assert "(4, 64)" in failure.message
    assert "(8, 64)" in failure.message
