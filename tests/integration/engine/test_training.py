"""Every family and every method trains on a tiny checkpoint, through the planner, in one process."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes.engine_runs import RunLog, Workspace
from tests.fakes.tiny_models import FAMILIES, TinyOptions
from tunesmith.common.v1 import errors_pb2, event_pb2, plan_pb2

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "qlora-fp4": ("qlora", {"quantization": {"method": "fp4"}}),
    "qlora-int8": ("qlora", {"quantization": {"method": "int8"}}),
    "qlora-single-quantization": ("qlora", {"quantization": {"double_quantization": False}}),
    "qlora-bfloat16": ("qlora", {"quantization": {"compute_dtype": "bfloat16"}}),
    "lora": ("lora", {}),
    "full": ("full", {"optimizer": {"learning_rate": 1e-3}}),
    "gradient-checkpointing": ("qlora", {"gradient_checkpointing": True}),
}


def _run_counts(row: plan_pb2.DatasetPlan) -> tuple[object, ...]:
    return row.trait_type, row.dataset_id, row.run_examples, row.run_tokens, row.run_target_tokens


def assert_trained(log: RunLog, num_steps: int = 2) -> None:
    """The run succeeded, each step has a finite loss, and what was realized is what was planned."""
    assert log.states == ["RUNNING", "SUCCEEDED"], log.payloads[-1]
    assert sorted(log.losses) == list(range(1, num_steps + 1))
    assert all(math.isfinite(loss) for loss in log.losses.values())
    (plan,) = log.of("plan")
    (realized,) = log.of("realized")
    assert realized.num_steps == plan.num_steps == num_steps
    assert realized.total_examples == plan.total_examples
    assert realized.total_tokens == plan.total_tokens
    assert realized.total_target_tokens == plan.total_target_tokens
    planned_rows = [row for row in plan.datasets if row.run_examples]
    assert [_run_counts(row) for row in realized.datasets] == [_run_counts(row) for row in planned_rows]
    assert realized.data_digest == plan.data_digest != ""


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_in_4_bits(family: str, workspace: Workspace, run_in_process: Any) -> None:
    log = run_in_process(workspace.make_run(f"family-{family}", options=TinyOptions(family=family)))

    assert_trained(log)
    (plan,) = log.of("plan")
    assert log.stage_details("ADAPTER")["covered_linears"] == str(plan.num_covered_linears)
    assert plan.num_covered_linears == plan.num_linears > 0
    assert log.stage_details("ADAPTER")["trainable_parameters"] == str(plan.num_trainable_parameters)
    assert log.stage_details("QUANTIZATION")["quantized_linears"] == str(plan.num_linears)


@pytest.mark.parametrize("case", METHODS)
def test_method_trains(case: str, workspace: Workspace, run_in_process: Any) -> None:
    training_type, hyperparameters = METHODS[case]
    log = run_in_process(
        workspace.make_run(f"method-{case}", training_type=training_type, hyperparameters=hyperparameters)
    )

    assert_trained(log)


@pytest.mark.parametrize(
    ("training_type", "options"),
    [
        ("qlora", TinyOptions(tied=True)),
        ("qlora", TinyOptions(sharded=True)),
        ("qlora", TinyOptions(family="qwen3", tied=True)),
        ("full", TinyOptions(tied=True, sharded=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_heads_and_shards(options: TinyOptions, training_type: str, workspace: Workspace, run_in_process: Any) -> None:
    log = run_in_process(
        workspace.make_run(f"{training_type}-{options.name}", options=options, training_type=training_type)
    )

    assert_trained(log)
    assert int(log.stage_details("WEIGHTS")["shards"]) > 1 or not options.sharded
    # Files are counted in bytes, then tensors as they are placed; each count is told as it grows.
    placed = "WEIGHTS" if training_type == "full" else "QUANTIZATION"
    for stage, unit in (("WEIGHTS", "bytes"), (placed, "tensors")):
        counts = log.progress(stage, unit)
        assert counts == sorted(set(counts))
        assert len(counts) > 1 or unit == "bytes"


def test_what_a_run_says(workspace: Workspace, run_in_process: Any) -> None:
    """The order of events is the contract's, and each step adds up."""
    directory = workspace.make_run(
        "says",
        hyperparameters={"num_steps": 4, "evaluate_every_steps": 2, "save_every_steps": 1, "keep_checkpoints": 2},
        sample_prompts=[{"trait_type": "arithmetic", "prompt": "What is 2 plus 2?", "max_new_tokens": 3}],
    )
    log = run_in_process(directory)

    assert_trained(log, num_steps=4)
    assert log.phases[:4] == ["PLANNING", "LOADING", "EVALUATING", "EVALUATING"]
    assert log.phases[-1] == "SAVING"
    kinds = [payload.WhichOneof("kind") for payload in log.payloads]
    assert kinds[:4] == ["run_state", "phase", "plan", "phase"]
    assert kinds[-5:] == ["realized", "artifact", "artifact", "memory_released", "run_state"]
    finished = [stage for stage, status in log.stages if status == "FINISHED"]
    assert finished == ["CONFIG", "TOKENIZER", "WEIGHTS", "QUANTIZATION", "ADAPTER"]
    assert [stage for stage, status in log.stages if status == "STARTED"] == finished
    assert {stage for stage, status in log.stages if status == "PROGRESS"} == set(finished)

    for event in log.of("step"):
        for values in (event.trait_losses, event.dataset_losses):
            weighted = sum(value.loss * value.num_target_tokens for value in values)
            assert event.num_target_tokens == sum(value.num_target_tokens for value in values)
            assert weighted / event.num_target_tokens == pytest.approx(event.loss, rel=1e-12)
        assert {(value.trait_type, value.dataset_id) for value in event.dataset_losses} <= {
            ("arithmetic", 1),
            ("coding", 2),
        }
        assert not event.skipped
        assert not event.HasField("preference")
        assert event.total_steps == 4
        assert event.num_examples == 4
        assert event.gradient_norm > 0
        assert event.tokens_per_second > 0
        assert event.peak_memory_bytes > 0
    assert [event.learning_rate for event in log.of("step")] == pytest.approx([0.005, 0.01, 0.0075, 0.0025])
    assert [event.remaining_seconds > 0 for event in log.of("step")] == [True, True, True, False]

    moments = [(event.moment, event.step) for event in log.of("evaluation")]
    assert moments == [
        (event_pb2.EVALUATION_MOMENT_BASE, 0),
        (event_pb2.EVALUATION_MOMENT_DURING, 2),
        (event_pb2.EVALUATION_MOMENT_FINAL, 4),
    ]
    for event in log.of("evaluation"):
        by_trait = {value.trait_type: value for value in event.losses if value.dataset_id == 0}
        by_dataset = {value.trait_type: value for value in event.losses if value.dataset_id}
        assert set(by_trait) == set(by_dataset) == {"arithmetic", "coding"}
        assert {value.dataset_id for value in by_dataset.values()} == {3, 4}
        assert by_trait["coding"].loss == pytest.approx(by_dataset["coding"].loss)
    assert [event.moment for event in log.of("sample")] == [
        event_pb2.EVALUATION_MOMENT_BASE,
        event_pb2.EVALUATION_MOMENT_FINAL,
    ]

    checkpoints = [(event.name, event.status) for event in log.of("checkpoint")]
    assert [name for name, status in checkpoints if status == event_pb2.CHECKPOINT_STATUS_COMMITTED] == [
        f"step-{step:08d}" for step in (1, 2, 3, 4)
    ]
    # The second is the best by held-out loss.
    assert [name for name, status in checkpoints if status == event_pb2.CHECKPOINT_STATUS_DELETED] == ["step-00000001"]
    kept = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000003", "step-00000004"]
    metrics = json.loads((directory / "artifacts/report/metrics.json").read_text())
    assert [step["loss"] for step in metrics["steps"]] == [event.loss for event in log.of("step")]
    assert (directory / "artifacts/report/loss.png").read_bytes().startswith(b"\x89PNG")
    listed = json.loads((directory / "artifacts/manifest.json").read_text())["artifacts"]
    assert [entry["name"] for entry in listed] == ["adapter", "report"]


def test_micro_batches_add_up_to_the_batch(workspace: Workspace, run_in_process: Any) -> None:
    """Passes of four, and of so many tokens, weighted by target tokens, train as one pass over all sixteen does."""
    divisions: list[dict[str, Any]] = [{}, {"micro_batch_examples": 4}, {"micro_batch_tokens": "90"}]
    whole, *divided = [
        run_in_process(
            workspace.make_run(
                f"division-{number}",
                training_type="full",
                hyperparameters={"num_steps": 3, "batch": {"examples": 16, **division}},
                held_out=False,
            )
        )
        for number, division in enumerate(divisions)
    ]

    for log in divided:
        # The first step differs by rounding alone; later ones by what the optimizer makes of it.
        for step, tolerance in ((1, 1e-6), (2, 1e-4), (3, 1e-4)):
            assert log.losses[step] == pytest.approx(whole.losses[step], rel=tolerance)
        norms = [event.gradient_norm for event in log.of("step")]
        expected = [event.gradient_norm for event in whole.of("step")]
        assert norms[0] == pytest.approx(expected[0], rel=1e-5)
        assert norms == pytest.approx(expected, rel=1e-3)


def test_measuring_changes_no_training(workspace: Workspace, run_in_process: Any) -> None:
    """Held-out loss and sample answers between the steps: the steps' losses stay the same to the last bit."""
    hyperparameters = {"num_steps": 3, "lora": {"rank": 4, "dropout": 0.2}}
    plain = run_in_process(workspace.make_run("unmeasured", hyperparameters=hyperparameters, held_out=False))
    measured = run_in_process(
        workspace.make_run(
            "measured",
            hyperparameters={**hyperparameters, "evaluate_every_steps": 1},
            sample_prompts=[{"trait_type": "coding", "prompt": "def add_1(", "max_new_tokens": 2}],
        )
    )

    assert_trained(measured, num_steps=3)
    assert len(measured.of("evaluation")) == 4
    assert measured.losses == plain.losses


def test_loss_falls_when_the_data_is_learned(workspace: Workspace, run_in_process: Any) -> None:
    log = run_in_process(workspace.make_run("learns", hyperparameters={"num_steps": 24}))

    before, after = log.of("evaluation")[0], log.of("evaluation")[-1]
    assert after.loss < before.loss - 0.5


def test_loss_that_is_not_finite_fails_the_run(workspace: Workspace, run_in_process: Any) -> None:
    name = workspace.place_model(TinyOptions(seed=7))
    path = workspace.models_directory / name / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, path)
    log = run_in_process(workspace.make_run("not-finite", base_model=name))

    assert log.states == ["RUNNING", "FAILED"]
    failure = log.of("run_state")[-1].failure
    assert failure.reason == errors_pb2.ERROR_REASON_NON_FINITE_LOSS
    warnings = log.of("warning")
    assert {event.code for event in warnings} == {"non-finite-loss"}
    # The base's held-out loss by trait, then the step.
    assert [event.trait_type for event in warnings] == ["arithmetic", "coding", ""]
    assert warnings[-1].message == failure.message
    (step,) = log.of("step")
    assert step.skipped
    assert not step.HasField("loss")
    assert not any(value.HasField("loss") for value in step.trait_losses)
    assert not log.of("checkpoint")


def test_time_limit_ends_training_with_artifacts(workspace: Workspace, run_in_process: Any) -> None:
    log = run_in_process(
        workspace.make_run("limited", hyperparameters={"num_steps": 5000, "max_duration_seconds": "1"})
    )

    assert log.states == ["RUNNING", "SUCCEEDED"]
    (realized,) = log.of("realized")
    assert realized.stopped_early
    assert 0 < realized.num_steps < 5000
    assert realized.total_examples == 4 * realized.num_steps
    assert [event.name for event in log.of("artifact")] == ["adapter", "report"]
    assert log.of("checkpoint")[-1].step == realized.num_steps


def test_fast_path_trains_the_same_however_it_saves_memory(workspace: Workspace, run_in_process: Any) -> None:
    asked: dict[str, dict[str, Any]] = {
        "plain": {},
        "offloaded": {"recomputation": {"offload": True}},
        "least": {"recomputation": {"offload": True, "feed_forward_slices": 2}},
        "mixed": {"recomputation": {"feed_forward_layers": 1, "elementwise_layers": 1}, "base_weights": "resident"},
    }
    logs = {}
    for name, values in asked.items():
        directory = workspace.make_run(
            f"memory-{name}",
            training_type="qlora",
            hyperparameters={"num_steps": 4, "trainer": "fast", **values},
        )
        logs[name] = run_in_process(directory)
        assert_trained(logs[name], 4)
    assert logs["plain"].losses == logs["offloaded"].losses == logs["mixed"].losses
    # Gradients of slices are added up.
    assert logs["least"].losses == pytest.approx(logs["plain"].losses, rel=1e-5)
    plans = {name: log.of("plan")[0] for name, log in logs.items()}
    assert plans["least"].resolved.recomputation.full_layers == 2
    assert plans["least"].resolved.recomputation.offload
    assert plans["least"].resolved.recomputation.feed_forward_slices == 2
    assert plans["least"].resolved.base_weights == "streamed"
    assert plans["mixed"].resolved.base_weights == "resident"
    messages = {name: " ".join(event.message for event in log.of("log")) for name, log in logs.items()}
    assert "2 whole, their inputs wait in host memory" in messages["offloaded"]
    assert "wait in host memory, their feed-forward half in 2 slices" in messages["least"]
    assert "restored once and kept" in messages["mixed"]
    assert "nothing is recomputed" in messages["plain"]


@pytest.mark.parametrize("training_type", ["qlora", "lora"])
def test_fast_path_trains_as_the_plain_path_does(training_type: str, workspace: Workspace, run_in_process: Any) -> None:
    """On a CPU it runs only when it is asked for; both runs share one base, which the first must give back clean."""
    logs = {}
    for trainer in ("fast", "reference", "auto"):
        directory = workspace.make_run(
            f"{training_type}-{trainer}",
            training_type=training_type,
            hyperparameters={"num_steps": 6, "trainer": trainer, "exports": ["merged"]},
            sample_prompts=[{"trait_type": "coding", "prompt": "What is 2 plus 2?", "max_new_tokens": 4}],
        )
        logs[trainer] = run_in_process(directory)
        assert_trained(logs[trainer], 6)
    plans = {trainer: log.of("plan")[0] for trainer, log in logs.items()}
    assert [plans[trainer].resolved.trainer for trainer in logs] == ["fast", "reference", "reference"]
    assert plans["fast"].trainer_reason == "asked for"
    assert "when it is asked for" in plans["auto"].trainer_reason
    messages = {trainer: [event.message for event in log.of("log")] for trainer, log in logs.items()}
    assert any("the fast path" in message for message in messages["fast"])
    assert any("transformers and PEFT" in message for message in messages["reference"])
    assert logs["auto"].losses == logs["reference"].losses
    for step, loss in logs["reference"].losses.items():
        assert logs["fast"].losses[step] == pytest.approx(loss, rel=1e-4)
    final, plain = (logs[trainer].of("evaluation") for trainer in ("fast", "reference"))
    assert [event.loss for event in final] == pytest.approx([event.loss for event in plain], rel=1e-4)
    names = []
    for trainer in ("fast", "reference"):
        (export,) = logs[trainer].of("export")
        assert export.accepted
        adapter = load_file(
            workspace.root / f"runs/{training_type}-{trainer}/1/artifacts/adapter/adapter_model.safetensors"
        )
        names.append({name: tuple(tensor.shape) for name, tensor in adapter.items()})
    assert names[0] == names[1]


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_trained_as_on_the_plain_path(tied: bool, workspace: Workspace, run_in_process: Any) -> None:
    """Losses, norms and what is saved; `auto` stays with the plain path on a CPU."""
    logs = {}
    for trainer in ("fast", "reference", "auto"):
        directory = workspace.make_run(
            f"full-{trainer}-{tied}",
            training_type="full",
            options=TinyOptions(tied=tied),
            hyperparameters={
                "num_steps": 6,
                "trainer": trainer,
                "optimizer": {"weight_decay": 0.1, "max_gradient_norm": 0.5, "learning_rate": 1e-3},
                "batch": {"examples": 4, "micro_batch_examples": 3},
            },
            sample_prompts=[{"trait_type": "coding", "prompt": "What is 2 plus 2?", "max_new_tokens": 4}],
        )
        logs[trainer] = run_in_process(directory)
        assert_trained(logs[trainer], 6)
    plans = {trainer: log.of("plan")[0].resolved for trainer, log in logs.items()}
    assert [plans[trainer].trainer for trainer in logs] == ["fast", "reference", "reference"]
    assert plans["fast"].full_memory == "standard"
    assert any("every weight, held in float32" in event.message for event in logs["fast"].of("log"))
    for ours, theirs in zip(logs["fast"].of("step"), logs["reference"].of("step"), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3)
    final, plain = (logs[trainer].of("evaluation") for trainer in ("fast", "reference"))
    assert [event.loss for event in final] == pytest.approx([event.loss for event in plain], rel=1e-4)
    saved = [
        load_file(workspace.root / f"runs/full-{trainer}-{tied}/1/artifacts/model/model.safetensors")
        for trainer in ("fast", "reference")
    ]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(tensor, saved[1][name], rtol=2e-2, atol=2e-3)


def test_little_memory_is_said_to_be_so(workspace: Workspace, run_in_process: Any) -> None:
    directory = workspace.make_run(
        "full-low",
        training_type="full",
        hyperparameters={"num_steps": 4, "full_memory": "low", "quantization": {"compute_dtype": "bfloat16"}},
    )
    log = run_in_process(directory)
    assert_trained(log, 4)
    (plan,) = log.of("plan")
    assert "other numerics" in plan.trainer_reason
    assert "the backward pass is made twice" in plan.memory_reason
    assert any("by chance" in warning for warning in plan.warnings)
    assert any("no gradient is kept" in event.message for event in log.of("log"))
    card = (workspace.root / "runs/full-low/1/artifacts/model/README.md").read_text()
    assert "bfloat16 with moments of 8 bits" in card


def test_products_in_8_bits_are_said_to_be_so(workspace: Workspace, run_in_process: Any) -> None:
    """In the plan, its warnings, the log and the card; on a CPU they are emulated."""
    directory = workspace.make_run(
        "fp8",
        training_type="qlora",
        hyperparameters={
            "num_steps": 4,
            "trainer": "fast",
            "compute": "fp8",
            "quantization": {"compute_dtype": "bfloat16"},
        },
    )
    log = run_in_process(directory)
    assert_trained(log, 4)
    (plan,) = log.of("plan")
    assert plan.resolved.compute == "fp8"
    assert "other numerics" in plan.trainer_reason
    assert any("fp8" in warning and "other numerics" in warning for warning in plan.warnings)
    assert any("rounded to 8 bits (fp8)" in event.message for event in log.of("log"))
    card = (workspace.root / "runs/fp8/1/artifacts/adapter/README.md").read_text()
    assert "8 bits (fp8 e4m3): other numerics" in card
