"""A spec is read strictly."""

from typing import Any

import pytest

from gpu_service.domain.errors import Fault, Refusal
from gpu_service.domain.spec import TrainingSpec, spec_digest


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"colour": 1}, "colour"),
        ({"base_model": 3}, "base_model"),
        ({"traits": {}}, "traits"),
        ({"traits": [{"datasets": [{"dataset_id": "x"}]}]}, "traits[0].datasets[0].dataset_id"),
        ({"traits": [{"weight": "NaN"}]}, "traits[0].weight"),
        ({"traits": [{"weight": "Infinity"}]}, "traits[0].weight"),
        ({"traits": [{"weight": 10**400}]}, "traits[0].weight"),
        ({"traits": [{"weight": True}]}, "traits[0].weight"),
        ({"hyperparameters": {"seed": 1.5}}, "hyperparameters.seed"),
        ({"hyperparameters": {"seed": True}}, "hyperparameters.seed"),
        ({"hyperparameters": {"seed": "٣"}}, "hyperparameters.seed"),
        ({"hyperparameters": {"seed": ""}}, "hyperparameters.seed"),
        ({"hyperparameters": {"gradient_checkpointing": "true"}}, "hyperparameters.gradient_checkpointing"),
        ({"hyperparameters": {"lora": {"target_modules": "q_proj"}}}, "hyperparameters.lora.target_modules"),
        ({"hyperparameters": {"num_steps": 1, "num_epochs": 1}}, "hyperparameters.num_steps"),
        ([], ""),
    ],
)
def test_refused_with_the_field(value: Any, field: str) -> None:
    with pytest.raises(Refusal) as caught:
        TrainingSpec.from_json(value)
    assert caught.value.reason == "INVALID_FIELD"
    assert caught.value.field == field


def test_numbers_as_proto_json_has_them() -> None:
    spec = TrainingSpec.from_json(
        {"hyperparameters": {"seed": "-3", "num_epochs": "2.5", "max_length": 512.0}, "mix": {"total": None}}
    )
    assert spec.hyperparameters.seed == -3
    assert spec.hyperparameters.num_epochs == 2.5
    assert spec.hyperparameters.max_length == 512
    assert spec.mix.total is None


def test_the_digest_is_over_content_not_over_writing() -> None:
    assert spec_digest({"a": 1, "b": ["é"]}) == spec_digest({"b": ["é"], "a": 1})
    assert spec_digest({"a": 1}) != spec_digest({"a": 2})


def test_a_refusal_survives_the_planners_line() -> None:
    refusal = Refusal("MIX_INFEASIBLE", Fault.USER, "no", "PLANNING", "mix", {"dataset_id": "3"}, file="x")
    returned = Refusal.from_failure(refusal.to_failure())
    assert vars(returned) == vars(refusal)
