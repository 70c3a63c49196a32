"""What passes between messages and domain values loses nothing."""

from __future__ import annotations

import pytest

from control_service.wire.training_spec import proto_json, trait_message, trait_value
from tunesmith.common.v1 import training_spec_pb2 as spec

TRAITS = {
    "everything": spec.Trait(
        trait_type="coding",
        weight=0.5,
        datasets=[spec.TraitDataset(dataset_id=3, percentage=99.5), spec.TraitDataset(dataset_id=1, percentage=0.5)],
        held_out_dataset_ids=[7, 5],
        held_out_fraction=0.25,
    ),
    "zeros that were given": spec.Trait(
        trait_type="t", weight=0, held_out_fraction=0, datasets=[spec.TraitDataset(dataset_id=1, percentage=0)]
    ),
    "nothing that need not be": spec.Trait(trait_type="t", datasets=[spec.TraitDataset(dataset_id=1, percentage=100)]),
}


@pytest.mark.parametrize("case", TRAITS)
def test_a_trait_comes_back_as_it_was(case: str) -> None:
    assert trait_message(trait_value(TRAITS[case])) == TRAITS[case]


def test_the_case_of_everything_has_every_field() -> None:
    given = {field.name for field, _ in TRAITS["everything"].ListFields()}
    assert given == set(spec.Trait.DESCRIPTOR.fields_by_name)


def test_an_empty_message_is_no_json() -> None:
    assert proto_json(spec.Hyperparameters()) == {}
    assert proto_json(spec.Hyperparameters(seed=0)) == {"seed": "0"}
