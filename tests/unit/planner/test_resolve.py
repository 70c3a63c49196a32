"""Every cross-option refusal of `resolve`, with its reason, stage and field."""

from typing import Any

import pytest

from gpu_service.catalog.base_models import BaseModel
from gpu_service.domain.errors import Fault, Refusal
from gpu_service.domain.plan import Device
from tests.fakes.checked_specs import CPU, hyper, make_base, make_spec, plan

REFUSALS: list[tuple[str, dict[str, Any], BaseModel | None, Device, str, str, str]] = [
    ("type", make_spec(training_type="dora"), None, CPU, "TRAINING_TYPE_UNKNOWN", "training_type", ""),
    (
        "quant",
        hyper(quantization={"method": "gptq"}),
        None,
        CPU,
        "QUANTIZATION_UNKNOWN",
        "quantization.method",
        "QUANTIZATION",
    ),
    (
        "qlora-none",
        hyper(quantization={"method": "none"}),
        None,
        CPU,
        "COMBINATION_NOT_ALLOWED",
        "quantization.method",
        "QUANTIZATION",
    ),
    (
        "lora-nf4",
        make_spec(training_type="lora", hyperparameters={"quantization": {"method": "nf4"}}),
        None,
        CPU,
        "COMBINATION_NOT_ALLOWED",
        "quantization.method",
        "QUANTIZATION",
    ),
    (
        "full-int8",
        make_spec(training_type="full", hyperparameters={"quantization": {"method": "int8"}}),
        None,
        CPU,
        "COMBINATION_NOT_ALLOWED",
        "quantization.method",
        "QUANTIZATION",
    ),
    (
        "standard-nf4",
        make_spec(training_type="standard", hyperparameters={"quantization": {"method": "nf4"}}),
        None,
        CPU,
        "COMBINATION_NOT_ALLOWED",
        "quantization.method",
        "QUANTIZATION",
    ),
    (
        "double-int8",
        hyper(quantization={"method": "int8", "double_quantization": True}),
        None,
        CPU,
        "COMBINATION_NOT_ALLOWED",
        "double_quantization",
        "QUANTIZATION",
    ),
    ("family", make_spec(model_type="bert"), None, CPU, "MODEL_TYPE_UNKNOWN", "model_type", "CONFIG"),
    ("config-type", make_spec(), make_base(config_type="qwen2"), CPU, "MODEL_TYPE_MISMATCH", "model_type", "CONFIG"),
    (
        "no-family",
        make_spec(model_type=""),
        make_base(config_type="bert"),
        CPU,
        "MODEL_TYPE_UNKNOWN",
        "model_type",
        "CONFIG",
    ),
    (
        "no-type-at-all",
        make_spec(model_type=""),
        make_base(config_type=""),
        CPU,
        "MODEL_TYPE_UNKNOWN",
        "model_type",
        "CONFIG",
    ),
    ("problem", make_spec(), make_base(problem="broken"), CPU, "MODEL_INVALID", "base_model", "CONFIG"),
    (
        "targets",
        hyper(lora={"target_modules": ["c_attn"]}),
        None,
        CPU,
        "TARGETS_MATCH_NOTHING",
        "lora.target_modules",
        "ADAPTER",
    ),
    (
        "one-target",
        hyper(lora={"target_modules": ["q_proj", "proj"]}),
        None,
        CPU,
        "TARGETS_MATCH_NOTHING",
        "lora.target_modules",
        "ADAPTER",
    ),
    (
        "head",
        hyper(lora={"target_modules": ["lm_head"]}),
        None,
        CPU,
        "TARGETS_MATCH_NOTHING",
        "lora.target_modules",
        "ADAPTER",
    ),
    (
        "no-layers",
        make_spec(),
        make_base(linear_layers=()),
        CPU,
        "TARGETS_MATCH_NOTHING",
        "lora.target_modules",
        "ADAPTER",
    ),
    ("rank", hyper(lora={"rank": 10**9}), None, CPU, "INVALID_FIELD", "lora.rank", ""),
    ("rank-0", hyper(lora={"rank": 0}), None, CPU, "INVALID_FIELD", "lora.rank", ""),
    ("alpha-0", hyper(lora={"alpha": 0}), None, CPU, "INVALID_FIELD", "lora.alpha", ""),
    ("rate", hyper(optimizer={"learning_rate": -1}), None, CPU, "INVALID_FIELD", "optimizer.learning_rate", ""),
    ("optimizer", hyper(optimizer={"name": "lion"}), None, CPU, "INVALID_FIELD", "optimizer.name", ""),
    (
        "paged-cpu",
        hyper(optimizer={"name": "paged-adamw-8bit"}),
        None,
        CPU,
        "DEVICE_UNSUPPORTED",
        "optimizer.name",
        "",
    ),
    ("schedule", hyper(schedule={"name": "step"}), None, CPU, "INVALID_FIELD", "schedule.name", ""),
    ("loss-on", hyper(loss_on="some"), None, CPU, "INVALID_FIELD", "loss_on", ""),
    ("length", hyper(max_length=513), None, CPU, "INVALID_FIELD", "max_length", ""),
    (
        "micro",
        hyper(batch={"examples": 4, "micro_batch_examples": 5}),
        None,
        CPU,
        "INVALID_FIELD",
        "micro_batch_examples",
        "",
    ),
    ("micro-default", hyper(batch={"micro_batch_examples": 9}), None, CPU, "INVALID_FIELD", "micro_batch_examples", ""),
    ("batch-0", hyper(batch={"examples": 0}), None, CPU, "INVALID_FIELD", "batch.examples", ""),
    (
        "device",
        make_spec(),
        None,
        Device(type="tpu", name="tpu"),
        "DEVICE_UNSUPPORTED",
        "quantization.method",
        "QUANTIZATION",
    ),
    (
        "half-cpu",
        hyper(quantization={"compute_dtype": "float16"}),
        None,
        CPU,
        "DEVICE_UNSUPPORTED",
        "compute_dtype",
        "QUANTIZATION",
    ),
    (
        "bf16-old",
        hyper(quantization={"compute_dtype": "bfloat16"}),
        None,
        Device(type="cuda", compute_capability="7.5"),
        "DEVICE_UNSUPPORTED",
        "compute_dtype",
        "QUANTIZATION",
    ),
    ("fit", make_spec(), None, Device(total_memory_bytes=1_000_000), "DOES_NOT_FIT", "", "WEIGHTS"),
    (
        "template",
        make_spec(),
        make_base(has_chat_template=False),
        CPU,
        "CHAT_TEMPLATE_MISSING",
        "chat_template",
        "TOKENIZER",
    ),
    ("template-id", hyper(chat_template="vicuna"), None, CPU, "INVALID_FIELD", "chat_template", ""),
    ("unit", make_spec(mix={"unit": "letters"}), None, CPU, "INVALID_FIELD", "mix.unit", ""),
    ("policy", make_spec(mix={"policy": "pray"}), None, CPU, "INVALID_FIELD", "mix.policy", ""),
    ("infeasible", make_spec(mix={"policy": "fail", "total": "400"}), None, CPU, "MIX_INFEASIBLE", "mix", "PLANNING"),
    ("dataset", make_spec(datasets=[]), None, CPU, "DATASET_NOT_FOUND", "datasets", ""),
    (
        "percentages",
        make_spec(traits=[{"trait_type": "a", "datasets": [{"dataset_id": 1, "percentage": 99}]}]),
        None,
        CPU,
        "PERCENTAGES_NOT_100",
        "datasets",
        "",
    ),
    (
        "both",
        make_spec(
            traits=[
                {"trait_type": "a", "datasets": [{"dataset_id": 1, "percentage": 100}], "held_out_dataset_ids": [1]}
            ]
        ),
        None,
        CPU,
        "INVALID_FIELD",
        "held_out_dataset_ids",
        "",
    ),
    (
        "format",
        make_spec(datasets=[{"dataset_id": n, "format": "csv", "num_examples": "1"} for n in (1, 2, 3)]),
        None,
        CPU,
        "DATASET_FORMAT_UNKNOWN",
        "datasets",
        "",
    ),
]


@pytest.mark.parametrize(
    ("spec", "base", "device", "reason", "field", "stage"),
    [row[1:] for row in REFUSALS],
    ids=[row[0] for row in REFUSALS],
)
def test_refusals(
    spec: dict[str, Any], base: BaseModel | None, device: Device, reason: str, field: str, stage: str
) -> None:
    with pytest.raises(Refusal) as caught:
        plan(spec, base, device)
    refusal = caught.value
    assert (refusal.reason, refusal.stage, refusal.fault) == (reason, stage, Fault.USER)
    assert refusal.field.endswith(field)
    assert refusal.message


def test_a_mismatch_says_both_types() -> None:
    with pytest.raises(Refusal) as caught:
        plan(make_spec(), make_base(config_type="qwen2"))
    assert caught.value.details == {"model_type": "llama", "config_type": "qwen2"}


def test_a_missing_library_is_refused_when_versions_are_known() -> None:
    with pytest.raises(Refusal, match="bitsandbytes"):
        plan(make_spec(), torch="2.13.0")
    assert plan(make_spec(), bitsandbytes="0.50.2").quantization.id == "nf4"


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("device", [CPU, Device(type="cuda", name="gpu")], ids=["cpu", "cuda"])
def test_what_bitsandbytes_does_on_each_device(method: str, device: Device) -> None:
    resolved = plan(hyper(quantization={"method": method}), device=device).hyperparameters
    assert resolved.quantization.method == method
    assert resolved.quantization.double_quantization == (method != "int8")


@pytest.mark.parametrize(("model_type", "config_type"), [("code_llama", "llama"), ("llama", ""), ("", "llama")])
def test_accepted_types(model_type: str, config_type: str) -> None:
    planned = plan(make_spec(model_type=model_type), make_base(config_type=config_type))
    assert planned.family.id == (model_type or "llama")
    assert planned.config_type == "llama"


def test_every_linear_layer_is_covered_unless_named() -> None:
    everything = plan(make_spec())
    assert everything.to_json()["num_covered_linears"] == everything.to_json()["num_linears"] == 6
    assert everything.num_trainable_parameters == 2 * 16 * ((64 + 64) + (64 + 32) + (128 + 64))
    named = plan(hyper(lora={"target_modules": ["q_proj", "layers.1.mlp.down_proj"], "rank": 4}))
    assert [layer.path for layer in named.covered_layers] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert named.num_trainable_parameters == 4 * (128 + 128 + 192)


def test_full_trains_every_parameter_and_needs_their_optimizer() -> None:
    planned = plan(make_spec(training_type="standard"))
    assert planned.method.id == "full"
    assert planned.num_trainable_parameters == 100_000
    assert planned.memory.optimizer_bytes == 800_000
    assert planned.memory.adapter_bytes == 0
    assert any("'full'" in warning for warning in planned.warnings)


def test_moments_of_8_bits_take_a_quarter() -> None:
    optimizer_bytes = {
        name: plan({**hyper(optimizer={"name": name}), "training_type": "full"}, device=device).memory.optimizer_bytes
        for name, device in (("adamw", CPU), ("adamw-8bit", CPU), ("paged-adamw-8bit", Device(type="cuda")))
    }
    assert optimizer_bytes["adamw"] == 8 * make_base().num_parameters
    # Two bytes, and two float32 scales for every 256 of them.
    assert optimizer_bytes["adamw-8bit"] == 203_125
    # Pages are the driver's, and go to the host when the device is full.
    assert optimizer_bytes["paged-adamw-8bit"] == 0


def test_an_optimizer_of_bitsandbytes_needs_bitsandbytes() -> None:
    spec = {**hyper(optimizer={"name": "adamw-8bit"}), "training_type": "lora"}
    with pytest.raises(Refusal) as refused:
        plan(spec, torch="2.13.0")
    assert (refused.value.reason, refused.value.field) == ("DEVICE_UNSUPPORTED", "hyperparameters.optimizer.name")
    assert plan(spec, torch="2.13.0", bitsandbytes="0.50.2").optimizer.id == "adamw-8bit"


def test_four_bits_weigh_less_than_eight_than_none() -> None:
    def weights(training_type: str, **quantization: Any) -> int:
        spec = make_spec(training_type=training_type, hyperparameters={"quantization": quantization})
        return plan(spec).memory.weights_bytes

    double, single = weights("qlora"), weights("qlora", double_quantization=False)
    assert double < single < weights("qlora", method="int8") < weights("lora")


@pytest.mark.parametrize(
    ("hyperparameters", "steps", "examples", "epochs"),
    [
        ({}, 15, 120, 1.0),
        ({"num_epochs": 2.5}, 38, 300, 2.5),
        ({"num_epochs": 1, "batch": {"examples": 7}}, 18, 120, 1.0),
        ({"num_steps": 30}, 30, 240, 2.0),
        ({"num_epochs": 0.0001}, 1, 1, 0.0001),
    ],
)
def test_steps(hyperparameters: dict[str, Any], steps: int, examples: int, epochs: float) -> None:
    planned = plan(make_spec(hyperparameters=hyperparameters))
    assert (planned.num_steps, planned.total_examples, planned.num_epochs) == (steps, examples, epochs)


def test_counts_come_from_the_registered_examples() -> None:
    # Both sources have half of the mix; the smaller has 60 examples. What is held out counts for nothing.
    planned = plan(make_spec())
    assert [(item.dataset_id, item.num_examples, item.held_out) for item in planned.datasets] == [
        (1, 60, False),
        (2, 60, False),
        (3, 10, True),
    ]
    assert planned.examples_per_epoch == 120


def test_a_named_template_serves_a_base_that_has_none() -> None:
    planned = plan(hyper(chat_template="plain-turns"), make_base(has_chat_template=False))
    assert planned.hyperparameters.chat_template == "plain-turns"
    replaced = plan(hyper(chat_template="chatml"))
    assert any("in place of the base model's own" in warning for warning in replaced.warnings)


def test_an_epoch_that_no_planner_could_hold_is_refused() -> None:
    spec = make_spec(mix={"policy": "repeat", "max_repeats": 1000, "total": "50000002"})
    for reference in spec["datasets"]:
        reference["num_examples"] = str(10**6)
    with pytest.raises(Refusal, match="TOO_LARGE"):
        plan(spec)
    spec["mix"]["total"] = "50000000"
    assert plan(spec).examples_per_epoch == 50_000_000


def test_long_data_is_a_warning_until_its_length_is_known() -> None:
    needed = plan(make_spec()).memory
    device = Device(total_memory_bytes=needed.standing_bytes + 1)
    assert any("max_length" in warning for warning in plan(make_spec(), device=device).warnings)
