"""A run goes on by the trainer that its checkpoint names; one of a version that named none, by what `auto` is now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_service.engine import devices
from gpu_service.engine.training.manifest_facts import read_trainer
from tests.fakes.engine_runs import RunLog, Workspace

pytestmark = pytest.mark.timeout(240)

RunInProcess = Callable[..., RunLog]
_SETTINGS: dict[str, Any] = {
    "num_steps": 4,
    "save_every_steps": 2,
    "quantization": {"compute_dtype": "float32"},
    "lora": {"rank": 4},
}


def _forget_trainer(checkpoint: Path) -> None:
    """As a version wrote it that did not name it, and had no digest of the manifest's own facts."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("trainer", "facts_sha256"):
        del manifest[name]
    del manifest["certificate"]["environment"]["trainer"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("is_named", [True, False])
def test_a_run_of_the_libraries_goes_on_so_where_the_fast_path_could(
    is_named: bool, workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"training_type": "lora", "held_out": False, "hyperparameters": _SETTINGS}
    first = workspace.make_run(f"begun-{is_named}", **options)
    log = run_in_process(first)
    assert log.of("plan")[0].resolved.trainer == "reference"
    checkpoint = first / "checkpoints" / "step-00000002"
    assert read_trainer(checkpoint) == "reference"
    if not is_named:
        _forget_trainer(checkpoint)
        assert read_trainer(checkpoint) == ""

    # The node is upgraded, or another one goes on: there `auto` is the fast path.
    told = {"type": "cuda", "name": "a card", "compute_capability": "9.0"}
    monkeypatch.setattr(devices.CpuDevice, "describe", lambda device: told)
    fresh = run_in_process(workspace.make_run(f"fresh-{is_named}", **options))
    assert fresh.of("plan")[0].resolved.trainer == "fast"
    resume = workspace.resume_point(first, 2)
    resumed = run_in_process(workspace.make_run(f"resumed-{is_named}", attempt=2, resume=resume, **options))
    assert resumed.states == ["RUNNING", "SUCCEEDED"]
    (plan,) = resumed.of("plan")
    assert plan.resolved.trainer == ("reference" if is_named else "fast")
    assert ("goes on from" in plan.trainer_reason) == is_named
    rest = {step: loss for step, loss in log.losses.items() if step > 2}
    assert resumed.losses == (rest if is_named else pytest.approx(rest, rel=1e-4))


def test_a_fast_run_says_so_in_its_checkpoints(workspace: Workspace, run_in_process: RunInProcess) -> None:
    directory = workspace.make_run("fast", held_out=False, hyperparameters={**_SETTINGS, "trainer": "fast"})
    run_in_process(directory)
    assert read_trainer(directory / "checkpoints" / "step-00000002") == "fast"


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_manifest_that_cannot_be_read_says_nothing(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert read_trainer(tmp_path) == ""
