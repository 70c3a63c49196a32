"""A fraction of each dataset is held out: chosen by the seed, never trained on, and part of the digest."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service.domain.counts import count_held_out
from gpu_service.domain.errors import Refusal
from gpu_service.domain.spec import DatasetReference, Trait, TraitDataset
from tests.fakes.datasets import make_spec
from tests.fakes.plans import PlanningRoom, by_dataset, used_rows, write_rows


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanningRoom:
    return PlanningRoom(tmp_path, monkeypatch)


def with_fraction(spec: dict[str, Any], fraction: float) -> dict[str, Any]:
    traits = [{**trait, "held_out_fraction": fraction} for trait in spec["traits"]]
    return {**spec, "traits": traits}


def held_out_counts(plan: Any) -> dict[int, int]:
    return {row["dataset_id"]: int(row["num_examples"]) for row in plan["datasets"] if row["held_out"]}


@pytest.mark.parametrize("mix", [{}, {"unit": "tokens"}, {"policy": "repeat", "max_repeats": 3}])
def test_what_is_held_out_is_never_trained_on(room: PlanningRoom, mix: dict[str, Any]) -> None:
    references = [room.write(1, write_rows(50, seed=1)), room.write(2, write_rows(3, seed=2))]
    apart = room.write(3, write_rows(7, seed=3))
    plain = make_spec([*references, apart], held_out=[3], mix=mix)
    spec = with_fraction(plain, 0.1)
    data = room.plan(spec)
    held_out, trained = used_rows(data, held_out=True), used_rows(data)
    # A tenth of 50; at least one of 3; and all of the dataset that is held out besides.
    assert {key[1]: len(rows) for key, rows in held_out.items()} == {1: 5, 2: 1, 3: 7} == held_out_counts(data.plan)
    for dataset_id, size in ((1, 50), (2, 3)):
        key = ("reasoning", dataset_id)
        assert set(held_out[key]).isdisjoint(trained[key])
        assert set(trained[key]) | set(held_out[key]) <= set(range(size))
    assert int(by_dataset(data)[2]["num_available"]) == 2
    assert {tuple(rows) for rows in used_rows(room.plan(spec), held_out=True).values()} == {
        tuple(rows) for rows in held_out.values()
    }
    seeded = room.plan({**spec, "hyperparameters": {"seed": "7"}})
    assert used_rows(seeded, held_out=True) != held_out
    other = [room.plan(plain), room.plan(with_fraction(plain, 0.3)), seeded]
    assert len({plan.plan["data_digest"] for plan in (*other, data)}) == 4


def test_the_same_rows_under_another_name_are_not_held_out(room: PlanningRoom) -> None:
    rows = write_rows(20)
    references = [room.write(1, rows), room.write(2, rows), room.write(3, write_rows(5, seed=3))]
    with pytest.raises(Refusal, match="dataset 2 is trained on and held out: dataset 1 has the same rows") as caught:
        room.plan(make_spec(references, held_out=[2, 3]))
    assert (caught.value.reason, caught.value.field) == ("INVALID_FIELD", "traits.held_out_dataset_ids")


def test_all_the_rest_is_trained_on_once_by_default(room: PlanningRoom) -> None:
    data = room.plan(with_fraction(make_spec([room.write(1, write_rows(40))]), 0.25))
    [trained] = used_rows(data).values()
    [held_out] = used_rows(data, held_out=True).values()
    assert sorted(trained + held_out) == list(range(40))
    assert room.num_tokenized == 40


def test_a_large_source_is_not_tokenized_for_it(room: PlanningRoom) -> None:
    references = [room.write(1, write_rows(20, seed=1)), room.write(2, write_rows(5000, seed=2))]
    data = room.plan(with_fraction(make_spec(references), 0.01))
    assert held_out_counts(data.plan) == {1: 1, 2: 50}
    # 19 of each are trained on, and one more of the second by rounding.
    assert room.num_tokenized == 51 + int(data.plan["examples_per_epoch"])
    per_epoch = data.plan["examples_per_epoch"]
    warning = f"51 examples are held out and evaluated, more than the {per_epoch} of an epoch"
    assert warning in data.plan["warnings"]


def test_traits_that_share_a_dataset_hold_out_the_same_first(room: PlanningRoom) -> None:
    reference = room.write(1, write_rows(40))
    spec = make_spec([reference])
    datasets = spec["traits"][0]["datasets"]
    spec["traits"] = [
        {"trait_type": "a", "datasets": datasets, "held_out_fraction": 0.1},
        {"trait_type": "b", "datasets": datasets, "held_out_fraction": 0.25},
        {"trait_type": "c", "datasets": datasets},
    ]
    data = room.plan(spec)
    held_out = used_rows(data, held_out=True)
    assert {key: len(rows) for key, rows in held_out.items()} == {("a", 1): 4, ("b", 1): 10}
    assert set(held_out["a", 1]) < set(held_out["b", 1])
    for rows in used_rows(data).values():
        assert len(rows) == 30
        assert set(rows).isdisjoint(held_out["b", 1])


def test_a_dataset_of_one_example_has_none_to_train_on(room: PlanningRoom) -> None:
    references = [room.write(1, write_rows(1)), room.write(2, write_rows(10, seed=2))]
    with pytest.raises(Refusal) as caught:
        room.plan(with_fraction(make_spec(references), 0.1))
    assert (caught.value.reason, caught.value.details["dataset_id"]) == ("MIX_INFEASIBLE", "1")
    empty = room.write(3, [])
    data = room.plan(with_fraction(make_spec([references[1], empty], percentages={2: 100, 3: 0}), 0.1))
    assert held_out_counts(data.plan) == {2: 1}


@pytest.mark.parametrize("fraction", [-0.1, 0.51, 1.0])
def test_a_fraction_out_of_range_is_refused(room: PlanningRoom, fraction: float) -> None:
    with pytest.raises(Refusal) as caught:
        room.plan(with_fraction(make_spec([room.write(1, write_rows(10))]), fraction))
    assert (caught.value.reason, caught.value.field) == ("INVALID_FIELD", "traits[0].held_out_fraction")


@given(st.floats(0, 0.5), st.integers(0, 1000))
def test_counts_of_a_fraction(fraction: float, there: int) -> None:
    trait = Trait(trait_type="a", datasets=(TraitDataset(dataset_id=1, percentage=100),), held_out_fraction=fraction)
    reference = DatasetReference(dataset_id=1, sha256="a", num_examples=there)
    counted = count_held_out([trait], [reference], {1: there})
    count = counted.counts.get(("a", 1), 0)
    assert counted.reserved[1] == count <= there
    if fraction and there:
        assert count == 1 or math.isclose(count, fraction * there, abs_tol=0.501)
        assert count >= 1
    else:
        assert count == 0
