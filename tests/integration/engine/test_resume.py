"""An interrupted training and an uninterrupted one are the same to the last bit, wherever it was interrupted."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gpu_service.catalog import base_models
from gpu_service.engine import durable
from tests.fakes.engine_runs import RunLog, TraitRows, Workspace, read_log
from tests.fakes.tiny_models import TinyOptions
from tunesmith.common.v1 import errors_pb2

# Thirty-two examples, four a step.
_STEPS_PER_EPOCH = 8
# Into the third epoch; of those that are gone on from a few times only, to the end of the second.
_NUM_STEPS = {
    "qlora": 21,
    "lora": 21,
    "full": 21,
    "lora-dpo": 16,
    "full-adamw-8bit": 16,
    "qlora-fast": 16,
    "lora-dpo-fast": 16,
    "full-fast": 16,
    "full-low": 16,
}
_NUM_RESUMED = {
    "qlora": 20,
    "lora": 20,
    "full": 20,
    "lora-dpo": 4,
    "full-adamw-8bit": 4,
    "qlora-fast": 4,
    "lora-dpo-fast": 4,
    "full-fast": 4,
    "full-low": 4,
}
_METHODS: dict[str, dict[str, Any]] = {
    # Dropout draws from the generators whose state is kept.
    "qlora": {"lora": {"rank": 4, "dropout": 0.2}},
    "lora": {"lora": {"rank": 4, "dropout": 0.2}},
    "full": {"optimizer": {"learning_rate": 1e-3}},
    "lora-dpo": {"lora": {"rank": 4, "dropout": 0.2}, "objective": "dpo"},
    "qlora-fast": {"trainer": "fast", "lora": {"rank": 4, "dropout": 0.2}},
    "lora-dpo-fast": {"trainer": "fast", "lora": {"rank": 4, "dropout": 0.2}, "objective": "dpo"},
    # Two passes a step, whose gradients add up.
    "full-fast": {
        "trainer": "fast",
        "quantization": {"compute_dtype": "bfloat16"},
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"examples": 4, "micro_batch_examples": 2},
    },
    "full-low": {
        "full_memory": "low",
        "quantization": {"compute_dtype": "bfloat16"},
        "optimizer": {"learning_rate": 1e-3},
    },
    # Matrices of 4,096 elements and more have their moments in 8 bits.
    "full-adamw-8bit": {"optimizer": {"name": "adamw-8bit", "learning_rate": 1e-3}},
}
_PAIRS = [
    {"prompt": f"What is {n}?", "chosen": f" {n} it is", "rejected": " no" * (1 + n % 3)}
    for n in range(4 * _STEPS_PER_EPOCH)
]
# What a training is made of; the trainer's own file has seconds in it.
_STATE_FILES = {"weights.safetensors", "optimizer.safetensors", "optimizer.json", "random.safetensors"}


_SHORT: dict[str, Any] = {"num_steps": 3, "save_every_steps": 2}


def _hyperparameters(method: str) -> dict[str, Any]:
    return {
        "num_steps": _NUM_STEPS[method],
        "save_every_steps": 1,
        "keep_checkpoints": 1000,
        **_METHODS[method],
    }


def _planner(plan_directory: Path) -> list[str]:
    """A planner that gives this plan at once."""
    answer = json.dumps({"type": "planned", "plan_directory": str(plan_directory)})
    return ["sh", "-c", 'printf "%s\\n" "$0"', answer]


def _planned(log: RunLog, workspace: Workspace) -> list[str]:
    """A planner that gives the plan of an earlier run at once."""
    (plan,) = log.of("plan")
    return _planner(workspace.find_plan(plan))


def _planned_without_saves(log: RunLog, workspace: Workspace) -> list[str]:
    """The same with no checkpoint but the last: most of the time of so short a training goes into them."""
    (plan,) = log.of("plan")
    directory = workspace.find_plan(plan)
    # Plans lie side by side: each names its tokens relative to itself.
    copy = Path(shutil.copytree(directory, directory.with_name(f"{directory.name}-without-saves")))
    content = json.loads((copy / "plan.json").read_text())
    content["resolved"]["save_every_steps"] = 0
    (copy / "plan.json").write_text(json.dumps(content))
    return _planner(copy)


def _state_of(run: Path, step: int) -> dict[str, str]:
    manifest = json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())
    return {file["path"]: file["sha256"] for file in manifest["files"] if file["path"] in _STATE_FILES}


def _trained_files(run: Path) -> dict[str, bytes]:
    """The tensor files of the artifact that the run was for: its adapter, or the whole model."""
    files = {
        path.relative_to(run).as_posix(): path.read_bytes()
        for name in ("adapter", "model")
        for path in (run / "artifacts" / name).rglob("*.safetensors")
    }
    assert files, "no trained weights were written"
    return files


@pytest.mark.parametrize("method", _METHODS)
def test_any_step_can_be_gone_on_from(
    method: str, workspace: Workspace, run_in_process: Callable[..., RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps drawn by a seed, each gone on from to the training's end with everything made anew.

    Every loss on the way, the last checkpoint's weights, moments and generators, and the artifact's bytes are those of
    the uninterrupted training. The same in other processes is `test_process`'s.
    """
    from gpu_service.engine.artifacts import report
    from gpu_service.engine.resident import BaseShelf

    # A picture takes as long as a few steps, and nothing here looks at it.
    monkeypatch.setattr(report, "plot", lambda progress, path, *, objective: path.touch())
    training_type = method.partition("-")[0]
    num_steps = _NUM_STEPS[method]

    def train(attempt: int, resume: dict[str, Any] | None, **options: Any) -> tuple[Path, RunLog]:
        directory = workspace.make_run(
            method,
            training_type=training_type,
            hyperparameters=_hyperparameters(method),
            held_out=False,
            traits=[TraitRows(trait_type="polite", rows=_PAIRS, format="preference")] if "dpo" in method else (),
            attempt=attempt,
            resume=resume,
        )
        log = run_in_process(directory, shelf=BaseShelf(), **options)
        assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
        return directory, log

    whole, uninterrupted = train(1, None)
    assert sorted(uninterrupted.losses) == list(range(1, num_steps + 1))
    # That checkpoints on the way change nothing is `test_certifying_changes_no_training`'s.
    planner = _planned_without_saves(uninterrupted, workspace)
    steps = sorted(random.Random(7).sample(range(1, num_steps), _NUM_RESUMED[method]))
    assert any(step > _STEPS_PER_EPOCH and step % _STEPS_PER_EPOCH for step in steps)
    last, weights = _state_of(whole, num_steps), _trained_files(whole)

    for attempt, step in enumerate(steps, start=2):
        rest, resumed = train(attempt, workspace.resume_point(whole, step), planner_command=planner)
        (event,) = resumed.of("resumed")
        assert event.saved_probe_loss == event.measured_probe_loss
        assert resumed.losses == {n: loss for n, loss in uninterrupted.losses.items() if n > step}
        assert _state_of(rest, num_steps) == last
        assert _trained_files(rest) == weights


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A short training whose first checkpoint is gone on from."""

    run: Path
    planner: list[str]


@pytest.fixture(scope="module")
def trained(workspace: Workspace, run_in_process: Callable[..., RunLog]) -> Trained:
    run = workspace.make_run("certified", training_type="lora", hyperparameters=_SHORT)
    log = run_in_process(run)
    return Trained(run=run, planner=_planned(log, workspace))


def _edit_tensors(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / name)
        change(tensors)
        save_file(tensors, checkpoint / name)

    return edit


def _edit_manifest(**facts: Any) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        path = checkpoint / "manifest.json"
        manifest = json.loads(path.read_text()) | facts
        # As whoever wrote it so would have: with a digest of these facts, or none.
        manifest.pop("facts_sha256")
        path.write_text(json.dumps(manifest))

    return edit


def _corrupt_second_moment(tensors: dict[str, Any]) -> None:
    name = next(name for name in sorted(tensors) if name.endswith("/exp_avg_sq"))
    tensors[name].view(-1)[0] *= 1.5


def _corrupt_weight(tensors: dict[str, Any]) -> None:
    tensors[min(tensors)].view(-1)[0] += 1e-3


def _make_cold(tensors: dict[str, Any]) -> None:
    """The moments of an optimizer that has never stepped, under the names of those that have."""
    for tensor in tensors.values():
        tensor.zero_()


_CORRUPTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "second-moment": (_edit_tensors("optimizer.safetensors", _corrupt_second_moment), "optimizer_sha256"),
    "cold-optimizer": (_edit_tensors("optimizer.safetensors", _make_cold), "optimizer_sha256"),
    "weight": (_edit_tensors("weights.safetensors", _corrupt_weight), "weights_sha256"),
    "other-data": (_edit_manifest(data_digest="0" * 64), "data_digest"),
    "other-spec": (_edit_manifest(spec_digest="1" * 64), "spec_digest"),
    "other-base": (_edit_manifest(weights_digest="2" * 64), "weights_digest"),
    "last-batch-again": (_edit_manifest(next_step=1), "next_step"),
}


def _remake_hashes(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = durable.list_files(checkpoint)
    durable.write_manifest(checkpoint, {name: fact for name, fact in manifest.items() if name != "files"}, files)


@pytest.mark.parametrize("case", _CORRUPTIONS)
def test_what_is_not_what_was_saved_is_refused(
    case: str, trained: Trained, workspace: Workspace, run_in_process: Callable[..., RunLog]
) -> None:
    """Although every file has the hash that the manifest names."""
    change, what = _CORRUPTIONS[case]
    checkpoint = _copy_of_checkpoint(trained, workspace.root / case)
    change(checkpoint)
    _remake_hashes(checkpoint)

    log = run_in_process(_gone_on(case, checkpoint, workspace), planner_command=trained.planner)

    failure = log.of("run_state")[-1].failure
    assert failure.reason == errors_pb2.ERROR_REASON_RESUME_MISMATCH, failure
    assert failure.fault == errors_pb2.FAULT_PLATFORM
    assert failure.details["checkpoint"] == checkpoint.name
    assert failure.details["what"] == what
    assert failure.details["saved"] != failure.details["measured"]
    assert not log.of("step")
    assert not log.of("resumed")


def test_another_base_shows_in_the_probe(
    trained: Trained, workspace: Workspace, run_in_process: Callable[..., RunLog]
) -> None:
    """A base that passes for the one that was trained on: the run fails with both losses."""
    from gpu_service.engine.resident import BaseShelf

    checkpoint = _copy_of_checkpoint(trained, workspace.root / "another-base")
    run = _gone_on("another-base", checkpoint, workspace)
    request = json.loads((run / "run.json").read_text())
    other = workspace.models_directory / workspace.place_model(TinyOptions(seed=3))
    request |= {"model_directory": str(other), "weights_digest": base_models.weights_digest(other)}
    (run / "run.json").write_text(json.dumps(request))
    _edit_manifest(weights_digest=request["weights_digest"])(checkpoint)

    log = run_in_process(run, planner_command=trained.planner, shelf=BaseShelf())

    failure = log.of("run_state")[-1].failure
    assert (failure.reason, failure.details["what"]) == (errors_pb2.ERROR_REASON_RESUME_MISMATCH, "probe_loss")
    saved = json.loads((trained.run / "checkpoints/step-00000002/manifest.json").read_text())["certificate"]
    assert float(failure.details["saved"]) == saved["probe_loss"] != float(failure.details["measured"])


def test_another_node_goes_on(trained: Trained, run_in_process: Callable[..., RunLog], tmp_path: Path) -> None:
    """Nothing but the checkpoint, the base and the datasets is there: its own plan has the same digest."""
    from gpu_service.engine.resident import BaseShelf

    elsewhere = Workspace(root=tmp_path)
    run = _gone_on("certified", _copy_of_checkpoint(trained, tmp_path / "received"), elsewhere)

    log = run_in_process(run, shelf=BaseShelf())

    assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    before = read_log(trained.run)
    assert log.of("plan")[0].data_digest == before.of("plan")[0].data_digest
    assert log.losses == {3: before.losses[3]}
    assert _state_of(run, 3) == _state_of(trained.run, 3)


def test_certifying_changes_no_training(workspace: Workspace, run_in_process: Callable[..., RunLog]) -> None:
    """A checkpoint, with its probe, after each step or after none: weights, moments and generators are the same."""
    runs = [
        workspace.make_run(
            f"saved-every-{interval}",
            training_type="lora",
            hyperparameters={**_SHORT, **_METHODS["lora"], "save_every_steps": interval},
        )
        for interval in (0, 1)
    ]
    plain, certified = [run_in_process(run) for run in runs]

    saved = [[event.step for event in log.of("checkpoint") if event.files] for log in (plain, certified)]
    assert saved == [[3], [1, 2, 3]]
    assert plain.losses == certified.losses
    assert _state_of(runs[0], 3) == _state_of(runs[1], 3)


def _copy_of_checkpoint(trained: Trained, place: Path) -> Path:
    return Path(shutil.copytree(trained.run / "checkpoints/step-00000002", place / "step-00000002"))


def _gone_on(job_id: str, checkpoint: Path, workspace: Workspace) -> Path:
    resume = {"checkpoint_directory": str(checkpoint), "checkpoint": checkpoint.name, "step": 2}
    return workspace.make_run(job_id, training_type="lora", hyperparameters=_SHORT, resume=resume)
