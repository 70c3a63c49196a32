"""What a run warns of: steps that are not finite, and traits that are not learned."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.engine.training.rises import find_rises
from tests.fakes.engine_runs import StopAfterStep, TraitRows, Workspace
from tests.fakes.tiny_models import TinyOptions
from tunesmith.common.v1 import errors_pb2

# A token of one row alone, whose embedding is not finite.
_POISON = "~"


def _place_poisoned(workspace: Workspace, seed: int) -> str:
    name = workspace.place_model(TinyOptions(seed=seed))
    directory = workspace.models_directory / name
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][vocabulary[_POISON]] = math.nan
    save_file(tensors, directory / "model.safetensors")
    return name


def _rows(count: int, poisoned: int | None = None) -> list[dict[str, str]]:
    rows = [{"prompt": f"add {n} and {n}", "completion": f" is {2 * n}"} for n in range(count)]
    if poisoned is not None:
        rows[poisoned]["prompt"] += _POISON
    return rows


def _weights(directory: Any, step: int) -> dict[str, torch.Tensor]:
    return load_file(directory / f"checkpoints/step-{step:08d}/weights.safetensors")


def test_a_skipped_step_leaves_the_weights_as_they_were(workspace: Workspace, run_in_process: Any) -> None:
    """The step is told, its place in data and schedule is used up, and the run goes on with what it had."""
    directory = workspace.make_run(
        "skips",
        base_model=_place_poisoned(workspace, seed=21),
        training_type="lora",
        hyperparameters={
            "num_steps": 8,
            "batch": {"examples": 4, "micro_batch_examples": 2},
            "non_finite_policy": "skip",
            "save_every_steps": 1,
            "keep_checkpoints": 20,
        },
        traits=[
            TraitRows(trait_type="clean", rows=_rows(16)),
            TraitRows(trait_type="poisoned", rows=_rows(16, poisoned=5)),
        ],
    )
    log = run_in_process(directory)

    assert log.states == ["RUNNING", "SUCCEEDED"], log.payloads[-1]
    steps = log.of("step")
    assert [event.step for event in steps] == list(range(1, 9))
    (skipped,) = [event for event in steps if event.skipped]
    assert not skipped.HasField("loss")
    assert {value.trait_type: value.HasField("loss") for value in skipped.trait_losses} == {
        "clean": True,
        "poisoned": False,
    }
    assert all(math.isfinite(event.loss) for event in steps if event is not skipped)
    (warning,) = log.of("warning")
    assert warning.code == "non-finite-loss"
    assert (warning.trait_type, warning.dataset_id) == ("poisoned", 2)
    assert f"step {skipped.step}" in warning.message

    changed = [
        any(not torch.equal(tensor, _weights(directory, step)[name]) for name, tensor in before.items())
        for step in range(2, 9)
        for before in [_weights(directory, step - 1)]
    ]
    assert changed == [step != skipped.step for step in range(2, 9)]
    assert skipped.step > 1
    (plan,), (realized,) = log.of("plan"), log.of("realized")
    assert realized.num_steps == plan.num_steps == 8
    assert realized.total_examples == plan.total_examples
    assert realized.total_target_tokens == plan.total_target_tokens
    metrics = json.loads((directory / "artifacts/report/metrics.json").read_text())
    assert [step["skipped"] for step in metrics["steps"]] == [event.skipped for event in steps]
    assert [step["dataset_losses"][0]["dataset_id"] for step in metrics["steps"]]


def test_the_default_stops_at_the_step(workspace: Workspace, run_in_process: Any) -> None:
    log = run_in_process(
        workspace.make_run(
            "stops",
            base_model=_place_poisoned(workspace, seed=22),
            hyperparameters={"num_steps": 8},
            traits=[TraitRows(trait_type="poisoned", rows=_rows(16, poisoned=5))],
        )
    )

    assert log.states == ["RUNNING", "FAILED"]
    assert log.of("run_state")[-1].failure.reason == errors_pb2.ERROR_REASON_NON_FINITE_LOSS
    assert [event.skipped for event in log.of("step")][-1]
    assert not any(event.skipped for event in log.of("step")[:-1])


def _copies(signs: str, *, shift: int = 0) -> list[dict[str, str]]:
    """Each sign's answer is itself; with a shift, every one has another's."""
    return [
        {"prompt": f"say {sign}", "completion": f" {signs[(place + shift) % len(signs)]}"}
        for place, sign in enumerate(signs)
    ]


def test_a_trait_with_shuffled_labels_is_told_of(workspace: Workspace, run_in_process: Any) -> None:
    """Its completions are permuted: the better they are learned, the worse the held-out ones come out."""
    log = run_in_process(
        workspace.make_run(
            "shuffled",
            training_type="full",
            hyperparameters={
                "num_steps": 60,
                "batch": {"examples": 16},
                "optimizer": {"learning_rate": 5e-3},
                "schedule": {"name": "constant", "warmup_steps": 0},
                "evaluate_every_steps": 5,
                "warn_after_rises": 2,
            },
            traits=[
                TraitRows(trait_type="clean", rows=_copies("01234567"), held_out=_copies("76543210")),
                TraitRows(trait_type="shuffled", rows=_copies("abcdefgh", shift=3), held_out=_copies("abcdefgh")),
            ],
        )
    )

    held_out = {
        trait: [value.loss for event in log.of("evaluation") for value in event.losses if value.trait_type == trait]
        for trait in ("clean", "shuffled")
    }
    assert min(held_out["clean"]) == held_out["clean"][-1]
    assert min(held_out["shuffled"]) < held_out["shuffled"][-1]
    warnings = [event for event in log.of("warning") if event.code == "held-out-loss-rising"]
    assert {event.trait_type for event in warnings} == {"shuffled"}


def test_a_row_of_rises_goes_through_a_checkpoint() -> None:
    def evaluation(loss: float) -> dict[str, Any]:
        return {"losses": [{"trait_type": "coding", "dataset_id": 0, "loss": loss}]}

    before = TrainingProgress(evaluations=[evaluation(1.0), evaluation(2.0)])
    after = TrainingProgress.from_json(json.loads(json.dumps(before.to_json())))
    after.evaluations.append(evaluation(3.0))
    assert [rise.num_rises for rise in find_rises(after.evaluations, 2)] == [2]


def test_an_evaluation_that_a_stop_cut_short_is_made_at_the_resume(workspace: Workspace, run_in_process: Any) -> None:
    """Held-out losses, and what is warned of and kept by them, are those of a run that never stopped."""
    hyperparameters = {"num_steps": 3, "evaluate_every_steps": 2, "lora": {"rank": 4, "dropout": 0.2}}
    whole = run_in_process(workspace.make_run("unstopped", hyperparameters=hyperparameters))
    directory = workspace.make_run("cut-short", hyperparameters=hyperparameters)
    stop = StopAfterStep(directory, 2)
    first = run_in_process(directory, switch=stop.switch, notify=stop)
    assert [event.step for event in first.of("evaluation")] == [0]
    rest = run_in_process(
        workspace.make_run(
            "cut-short", hyperparameters=hyperparameters, attempt=2, resume=workspace.resume_point(directory, 2)
        )
    )

    losses = [(event.step, event.loss) for event in whole.of("evaluation")]
    assert [step for step, _ in losses] == [0, 2, 3]
    assert [(event.step, event.loss) for log in (first, rest) for event in log.of("evaluation")] == losses
    assert rest.losses == {3: whole.losses[3]}
