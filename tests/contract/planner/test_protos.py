"""Spec, defaults, ranges, reasons and plan are those that the protos declare."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor

import gpu_service
from gpu_service.catalog import families, methods, optimizers, quantization
from gpu_service.catalog.base_models import BaseModel, LinearLayer
from gpu_service.domain import spec as spec_module
from gpu_service.domain.defaults import ABOVE, CHOICES, RANGES, ResolvedHyperparameters, resolve_mix
from gpu_service.domain.device import Device
from gpu_service.domain.errors import Fault
from gpu_service.domain.plan import resolve
from gpu_service.domain.spec import Mix, TrainingSpec
from tunesmith.common.v1 import constraints_pb2, errors_pb2, plan_pb2, training_spec_pb2

MESSAGES = training_spec_pb2.DESCRIPTOR.message_types_by_name


def make_base() -> BaseModel:
    layer = LinearLayer(path="model.layers.0.self_attn.q_proj", in_features=64, out_features=64)
    return BaseModel(
        name="tiny/llama",
        directory=Path("tiny/llama"),
        config_type="llama",
        hidden_size=64,
        intermediate_size=128,
        num_layers=1,
        vocabulary_size=512,
        max_position_embeddings=4096,
        linear_layers=(layer,),
        num_parameters=64 * 64 + 512 * 64,
        has_chat_template=True,
    )


def make_spec(training_type: str = "qlora", **hyperparameters: Any) -> TrainingSpec:
    format = "preference" if hyperparameters.get("objective") == "dpo" else "text"
    return TrainingSpec.from_json(
        {
            "base_model": "tiny/llama",
            "model_type": "llama",
            "training_type": training_type,
            "traits": [{"trait_type": "a", "datasets": [{"dataset_id": 1, "percentage": 100}]}],
            "datasets": [{"dataset_id": 1, "sha256": "0" * 64, "format": format, "num_examples": "800"}],
            "hyperparameters": hyperparameters,
        }
    )


def constraint(field: FieldDescriptor) -> Any:
    return field.GetOptions().Extensions[constraints_pb2.constraint]


def walk(message: Descriptor, prefix: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    for field in message.fields:
        if field.message_type is not None and field.message_type.file.name == message.file.name:
            yield from walk(field.message_type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_spec_has_every_field(name: str) -> None:
    cls = getattr(spec_module, name)
    assert [field.name for field in fields(cls)] == [field.name for field in MESSAGES[name].fields]


def test_a_spec_from_the_wire_is_read() -> None:
    message = training_spec_pb2.TrainingSpec(base_model="a/b")
    message.hyperparameters.seed = 2**62
    message.hyperparameters.batch.examples = 3
    message.hyperparameters.num_epochs = 0.5
    message.hyperparameters.lora.target_modules.append("q_proj")
    message.mix.total = 10**12
    message.datasets.add(dataset_id=1, num_examples=2**40)
    decoded = TrainingSpec.from_json(json_format.MessageToDict(message, preserving_proto_field_name=True))
    assert decoded.hyperparameters.seed == 2**62
    assert decoded.hyperparameters.batch.examples == 3
    assert decoded.hyperparameters.num_epochs == 0.5
    assert decoded.hyperparameters.lora.target_modules == ("q_proj",)
    assert decoded.mix.total == 10**12
    assert decoded.datasets[0].num_examples == 2**40


def test_ranges_are_the_declared_ones() -> None:
    declared = {}
    for path, field in walk(MESSAGES["Hyperparameters"]):
        rule = constraint(field)
        if not any(rule.HasField(name) for name in ("minimum", "maximum", "exclusive_minimum")):
            continue
        smallest = rule.exclusive_minimum if path in ABOVE else rule.minimum
        assert rule.HasField("exclusive_minimum") == (path in ABOVE), path
        declared[path] = (smallest, rule.maximum if rule.HasField("maximum") else 2**63 - 1)
    assert declared == dict(RANGES)


def test_choices_are_the_declared_ones() -> None:
    declared = {path: constraint(field).pattern for path, field in walk(MESSAGES["Hyperparameters"])}
    for path, choices in CHOICES.items():
        assert tuple(declared[path].split("|")) == choices


LITERAL = re.compile(r"-?[0-9.]+(e-?[0-9]+)?|true|false|[a-z]+")


def literal_defaults() -> list[tuple[str, str]]:
    return [
        (path, constraint(field).default)
        for path, field in walk(MESSAGES["Hyperparameters"])
        if LITERAL.fullmatch(constraint(field).default)
    ]


def test_there_are_literal_defaults() -> None:
    assert len(literal_defaults()) >= 14


@pytest.mark.parametrize(("path", "default"), literal_defaults())
def test_literal_defaults_are_applied(path: str, default: str) -> None:
    # What belongs to one objective, or to one trainer, is unset for the others.
    owners: dict[str, dict[str, Any]] = {
        "dpo": {"objective": "dpo"},
        "recomputation": {"trainer": "fast"},
        "full_memory": {"trainer": "fast", "training_type": "full"},
    }
    given = owners.get(path.partition(".")[0], {})
    value: Any = resolve(make_spec(**given), make_base(), Device()).hyperparameters
    for name in path.split("."):
        value = getattr(value, name)
    if isinstance(value, bool | str):
        assert str(value).lower() == default
    else:
        assert value == float(default)


@pytest.mark.parametrize(
    ("training_type", "method", "learning_rate"),
    [("qlora", "nf4", 2e-4), ("lora", "none", 2e-4), ("full", "none", 2e-5), ("standard", "none", 2e-5)],
)
def test_defaults_in_words_are_applied(training_type: str, method: str, learning_rate: float) -> None:
    resolved = resolve(make_spec(training_type), make_base(), Device()).hyperparameters
    assert resolved.quantization.method == method
    assert resolved.optimizer.learning_rate == learning_rate
    assert resolved.quantization.compute_dtype == "float32"
    assert resolved.batch.examples == resolved.batch.micro_batch_examples == 8
    assert resolved.num_epochs == 1.0
    assert resolved.num_steps is None
    assert resolved.max_length == 2048
    assert resolved.max_duration_seconds is None
    assert resolved.schedule.warmup_steps == 3  # 3 % of 100 steps
    assert (resolved.lora is None) == (method == "none" and training_type != "lora")
    if resolved.lora:
        assert resolved.lora.alpha == 32
        assert resolved.lora.target_modules == ("q_proj",)


def test_the_mix_defaults_are_the_declared_ones() -> None:
    declared = {field.name: constraint(field).default for field in MESSAGES["Mix"].fields}
    resolved = resolve_mix(Mix())
    assert resolved.policy == declared["policy"]
    assert resolved.max_repeats == int(declared["max_repeats"])
    assert resolved.total is None


def test_compute_dtype_follows_the_device() -> None:
    def dtype(capability: str) -> str:
        device = Device(type="cuda", name="gpu", compute_capability=capability)
        return resolve(make_spec(), make_base(), device).hyperparameters.quantization.compute_dtype

    assert (dtype("7.5"), dtype("8.0"), dtype("12.0")) == ("float32", "bfloat16", "bfloat16")


def test_a_plan_is_the_wire_s_plan() -> None:
    plan = resolve(make_spec(max_duration_seconds="60"), make_base(), Device(), spec_digest="abc")
    message = json_format.ParseDict(plan.to_json(), plan_pb2.Plan())
    assert message.level == plan_pb2.PLAN_LEVEL_CHECK
    assert message.num_steps == 100
    assert message.resolved.max_duration_seconds == 60
    assert message.memory.total_bytes == plan.memory.total_bytes
    assert message.spec_digest == "abc"
    # What the wire gives back is what went in.
    returned = json_format.MessageToDict(message.resolved, preserving_proto_field_name=True)
    assert ResolvedHyperparameters.from_json(returned) == plan.hyperparameters


def test_every_reason_is_on_the_wire() -> None:
    known = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118
    root = Path(next(iter(gpu_service.__path__)))
    used = set()
    for room in ("domain", "catalog", "planner"):
        for path in (root / room).rglob("*.py"):
            used |= set(re.findall(r'(?:Refusal|refuse_user)\(\s*"([A-Z_]+)"', path.read_text(encoding="utf-8")))
    assert len(used) > 15
    assert used <= known


def test_faults_are_the_wire_s() -> None:
    assert {f"FAULT_{fault}" for fault in Fault} == set(errors_pb2.Fault.keys()) - {"FAULT_UNSPECIFIED"}


@pytest.mark.parametrize("package", [families, methods, optimizers, quantization])
def test_entries_are_registered_under_their_ids(package: Any) -> None:
    for name, entry in package.REGISTRY.items():
        assert entry.id == name
        assert entry.builder.endswith(f".{name.replace('-', '_')}")
        assert entry.description
