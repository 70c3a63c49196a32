"""What a project must obey before it is stored."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from control_service.domain.errors import InvalidArgument
from control_service.domain.output_path import normalize_output_directory, problem_with_output_directory
from control_service.domain.project import ProjectDraft, checked, dataset_ids
from control_service.domain.spec import TrainingSpec, Trait, TraitDataset

GOOD = ProjectDraft(
    name="assistant",
    base_model="org/base",
    model_type="llama",
    training_type="qlora",
    output_directory="./a/b",
    traits=(
        Trait(
            trait_type="reasoning",
            datasets=(TraitDataset(dataset_id=1, percentage=60), TraitDataset(dataset_id=2, percentage=40)),
            held_out_dataset_ids=(9,),
        ),
    ),
)


def _with_percentages(*percentages: float) -> ProjectDraft:
    datasets = tuple(TraitDataset(dataset_id=n, percentage=p) for n, p in enumerate(percentages, start=1))
    return replace(GOOD, traits=(Trait(trait_type="t", datasets=datasets),))


def _refusal(draft: ProjectDraft) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as refused:
        checked(draft)
    return refused.value


def test_a_good_project_is_normalized() -> None:
    draft = checked(replace(GOOD, training_type="standard"))
    assert (draft.output_directory, draft.training_type) == ("a/b", "full")
    assert dataset_ids(draft.traits) == (1, 2, 9)


@pytest.mark.parametrize("percentages", [(100.0,), (33.33, 33.33, 33.33), (99.99,), (50.0, 50.01), (0.0, 100.0)])
def test_percentages_may_miss_100_by_a_hundredth(percentages: tuple[float, ...]) -> None:
    checked(_with_percentages(*percentages))


@pytest.mark.parametrize("percentages", [(99.0,), (99.98,), (50.0, 50.02), (50.0, 50.1), (0.0,)])
def test_percentages_that_do_not_add_up_name_the_trait(percentages: tuple[float, ...]) -> None:
    refusal = _refusal(_with_percentages(*percentages))
    assert refusal.reason == "PERCENTAGES_NOT_100"
    assert refusal.violations[0].field == "project.traits[0].datasets"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 101.0])
def test_a_percentage_is_a_number_from_0_to_100(bad: float) -> None:
    refusal = _refusal(_with_percentages(50.0, bad))
    assert refusal.reason == "INVALID_FIELD"
    assert refusal.violations[0].field == "project.traits[0].datasets[1].percentage"


def test_weights() -> None:
    trait = GOOD.traits[0]
    other = replace(trait, trait_type="other", held_out_dataset_ids=())
    checked(replace(GOOD, traits=(replace(trait, weight=0.0), other)))
    zero = _refusal(replace(GOOD, traits=(replace(trait, weight=0.0), replace(other, weight=0.0))))
    assert zero.reason == "WEIGHTS_ALL_ZERO"
    for bad in (-1.0, math.nan, math.inf):
        refusal = _refusal(replace(GOOD, traits=(replace(trait, weight=bad), other)))
        assert refusal.violations[0].field == "project.traits[0].weight"


def test_at_most_half_of_a_dataset_is_held_out() -> None:
    trait = GOOD.traits[0]
    for good in (None, 0.0, 0.1, 0.5):
        checked(replace(GOOD, traits=(replace(trait, held_out_fraction=good),)))
    for bad in (-0.1, 0.51, math.nan, math.inf):
        refusal = _refusal(replace(GOOD, traits=(replace(trait, held_out_fraction=bad),)))
        assert refusal.reason == "INVALID_FIELD"
        assert refusal.violations[0].field == "project.traits[0].held_out_fraction"


def test_names_are_said_once() -> None:
    trait = GOOD.traits[0]
    assert _refusal(replace(GOOD, traits=(trait, trait))).violations[0].field == "project.traits"
    twice = replace(trait, datasets=(trait.datasets[0], replace(trait.datasets[0], percentage=40)))
    assert _refusal(replace(GOOD, traits=(twice,))).violations[0].field == "project.traits[0].datasets"


def test_a_held_out_dataset_is_never_trained_on() -> None:
    refusal = _refusal(replace(GOOD, traits=(replace(GOOD.traits[0], held_out_dataset_ids=(2,)),)))
    assert refusal.violations[0].field == "project.traits[0].held_out_dataset_ids"


def test_every_violation_is_named() -> None:
    refusal = _refusal(replace(GOOD, name=" ", output_directory="/a", traits=()))
    fields = [violation.field for violation in refusal.violations]
    assert fields == ["project.name", "project.output_directory", "project.traits"]


@pytest.mark.parametrize(
    ("given", "normal"),
    [("a", "a"), ("./output/test", "output/test"), ("a//b/", "a/b"), ("a/./b", "a/b"), ("ünï/co de", "ünï/co de")],
)
def test_directories_that_are_legal(given: str, normal: str) -> None:
    assert problem_with_output_directory(given) == ""
    assert normalize_output_directory(given) == normal


@pytest.mark.parametrize(
    "given",
    [
        "",
        ".",
        "./",
        "/a",
        "//a",
        "..",
        "a/../b",
        "a/..",
        "%2e%2e/a",
        "a%2Fb",
        "a%5cb",
        "a\\b",
        "C:/a",
        "c:a",
        "a:b",
        "a\0b",
        "a\nb",
        "a\x7fb",
        "a\u202eb",
        "a\ud800b",
        "a./b",
        "a /b",
        " a",
        "CON",
        "a/nul.txt",
        "com1",
        "Lpt9.log",
        "a" * 256,
        "a/" * 300,
    ],
)
def test_directories_that_are_refused(given: str) -> None:
    assert problem_with_output_directory(given)
    refusal = _refusal(replace(GOOD, output_directory=given))
    assert refusal.reason == "PATH_NOT_ALLOWED"
    assert refusal.violations[0].field == "project.output_directory"


def test_the_digest_of_a_spec_says_its_content_and_survives_json() -> None:
    spec = TrainingSpec(
        base_model="org/base",
        model_type="llama",
        training_type="qlora",
        traits=GOOD.traits,
        datasets=(),
        hyperparameters={"seed": "7", "batch": {"examples": 8}},
    )
    assert TrainingSpec.from_json(spec.to_json()) == spec
    assert TrainingSpec.from_json(spec.to_json()).digest() == spec.digest()
    assert replace(spec, hyperparameters={"batch": {"examples": 8}, "seed": "7"}).digest() == spec.digest()
    assert replace(spec, hyperparameters={"seed": "8"}).digest() != spec.digest()
