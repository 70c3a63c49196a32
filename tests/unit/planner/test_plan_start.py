"""What `resolve` says of exports, of jobs that only export, and of starts from earlier jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_service.catalog.base_models import BaseModel, LinearLayer
from gpu_service.domain.device import Device
from gpu_service.domain.errors import Refusal
from gpu_service.domain.plan import CheckedPlan, resolve
from gpu_service.domain.spec import TrainingSpec

_LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
_BASE = BaseModel(
    name="tiny/llama",
    directory=Path("tiny/llama"),
    config_type="llama",
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    vocabulary_size=512,
    max_position_embeddings=512,
    linear_layers=tuple(
        LinearLayer(path=f"model.layers.0.{path}", in_features=64, out_features=64) for path in _LAYERS
    ),
    num_parameters=100_000,
)
_ONLY_Q = {"lora": {"target_modules": ["q_proj"]}}
_TRAITS = [{"trait_type": "a", "datasets": [{"dataset_id": 1, "percentage": 100}]}]
_DATASETS = [{"dataset_id": 1, "format": "text", "num_examples": "60"}]


def plan(training_type: str = "qlora", start: dict[str, Any] | None = None, **hyperparameters: Any) -> CheckedPlan:
    spec: dict[str, Any] = {
        "base_model": "tiny/llama",
        "training_type": training_type,
        "traits": _TRAITS,
        "datasets": _DATASETS,
        "hyperparameters": hyperparameters,
    }
    if start is not None:
        spec["start_from"] = {"job_id": "01EARLIER", "name": "adapter", "training_type": "lora", **start}
    return resolve(TrainingSpec.from_json(spec), _BASE, Device())


def export(**changes: Any) -> CheckedPlan:
    spec = {
        "base_model": "tiny/llama",
        "training_type": "qlora",
        "task": "export",
        "start_from": {"job_id": "01EARLIER", "name": "adapter", "training_type": "qlora"},
        "hyperparameters": {"exports": ["merged"]},
    }
    return resolve(TrainingSpec.from_json(spec | changes), _BASE, Device())


def test_merged_is_planned_for_adapters() -> None:
    resolved = plan(exports=["merged"]).hyperparameters
    assert resolved.exports == ("merged",)
    assert resolved.max_export_logit_difference == 1.0


@pytest.mark.parametrize(
    ("training_type", "name", "reason", "said"),
    [
        ("qlora", "gguf", "NOT_OFFERED", "llama.cpp"),
        ("full", "merged", "COMBINATION_NOT_ALLOWED", "`model`"),
        ("full", "gguf", "NOT_OFFERED", "llama.cpp"),
        ("qlora", "onnx", "INVALID_FIELD", "merged, gguf"),
    ],
)
def test_other_exports_are_refused_with_the_reason(training_type: str, name: str, reason: str, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        plan(training_type, exports=[name])
    assert refused.value.reason == reason
    assert refused.value.field == "hyperparameters.exports"
    assert said in refused.value.message


def test_an_export_needs_no_data() -> None:
    checked = export()
    assert (checked.num_steps, checked.datasets, checked.total_examples) == (0, (), 0)
    assert len(checked.covered_layers) == len(_LAYERS)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"start_from": None}, "start_from"),
        ({"hyperparameters": {}}, "hyperparameters.exports"),
        ({"task": "dream"}, "task"),
    ],
)
def test_an_export_of_nothing_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal, match="INVALID_FIELD") as refused:
        export(**changes)
    assert refused.value.field == field


def test_a_start_that_fits_is_planned() -> None:
    # Defaults on one side are the numbers on the other, and qlora goes on from lora.
    plan(start={})
    plan(start={"lora": {"rank": 16, "alpha": 32}})
    plan(start={"lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]}})
    plan("full", start={"name": "model", "training_type": "standard"})


@pytest.mark.parametrize(
    ("start", "given", "field", "both"),
    [
        ({"lora": {"rank": 8}}, {"rank": 4}, "rank", ("4", "8")),
        ({"lora": {"rank": 8}}, {}, "rank", ("16", "8")),
        ({"lora": {"rank": 8}}, {"rank": 8, "alpha": 8}, "alpha", ("8", "16")),
        (_ONLY_Q, {}, "target_modules", ("down_proj, q_proj, v_proj (3 layers)", "q_proj (1 layers)")),
        (_ONLY_Q, {"target_modules": ["v_proj"]}, "target_modules", ("v_proj (1 layers)", "q_proj (1 layers)")),
        ({"training_type": "full", "name": "model"}, {}, "training_type", ("qlora", "full")),
    ],
)
def test_a_start_that_does_not_fit_is_refused_with_both(
    start: dict[str, Any], given: dict[str, Any], field: str, both: tuple[str, str]
) -> None:
    with pytest.raises(Refusal, match="COMBINATION_NOT_ALLOWED") as refused:
        plan(start=start, lora=given)
    assert refused.value.field.endswith(field)
    assert (refused.value.details["wanted"], refused.value.details["found"]) == both
    assert "01EARLIER" in refused.value.message
