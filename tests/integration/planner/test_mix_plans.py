"""The mix contract on real rows: exact counts, shares by tokens, and nothing tokenized that is not taken."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gpu_service.domain.errors import Refusal
from gpu_service.domain.planned_data import PlannedData
from gpu_service.planner import selection
from tests.fakes.datasets import make_spec
from tests.fakes.plans import PlanningRoom, by_dataset, used_rows, write_rows

SHARES = {1: 60, 2: 30, 3: 10}
SIZES = {1: 100, 2: 10_000, 3: 30_000}


@pytest.fixture(scope="module")
def sources() -> dict[int, bytes]:
    return {
        dataset_id: "".join(json.dumps(row) + "\n" for row in write_rows(size, seed=dataset_id)).encode()
        for dataset_id, size in SIZES.items()
    }


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanningRoom:
    return PlanningRoom(tmp_path, monkeypatch)


@pytest.fixture
def references(room: PlanningRoom, sources: dict[int, bytes]) -> list[Any]:
    return [room.write(dataset_id, rows) for dataset_id, rows in sources.items()]


@pytest.mark.parametrize(
    ("mix", "counts", "tokenized"),
    [
        ({"total": "1000"}, [100, 50, 17], 167),
        ({"total": "1000", "policy": "repeat", "max_repeats": 6}, [600, 300, 100], 500),
        ({}, [100, 50, 17], 167),
    ],
)
def test_by_examples_the_steps_hold_exactly_the_plan(
    room: PlanningRoom, references: list[Any], mix: dict[str, Any], counts: list[int], tokenized: int
) -> None:
    data = room.plan(make_spec(references, percentages=SHARES, mix=mix))
    assert [int(row["num_examples"]) for row in by_dataset(data).values()] == counts
    rows = used_rows(data)
    assert [len(rows["reasoning", dataset_id]) for dataset_id in SHARES] == counts
    assert [len(set(rows["reasoning", dataset_id])) for dataset_id in SHARES] == [
        min(count, SIZES[dataset_id]) for dataset_id, count in zip(SHARES, counts, strict=True)
    ]
    assert room.num_tokenized == tokenized
    assert data.plan["data_digest"] == data.compute_digest()


@pytest.mark.parametrize("unit", ["examples", "tokens", "target_tokens"])
@pytest.mark.parametrize("policy", [{"policy": "fail"}, {"policy": "repeat", "max_repeats": 2}])
def test_what_cannot_be_met_names_the_first_source(
    room: PlanningRoom, references: list[Any], unit: str, policy: dict[str, Any]
) -> None:
    total = "1000" if unit == "examples" else "20000"
    with pytest.raises(Refusal) as caught:
        room.plan(make_spec(references, percentages=SHARES, mix={"unit": unit, "total": total, **policy}))
    assert (caught.value.reason, caught.value.details["dataset_id"]) == ("MIX_INFEASIBLE", "1")
    assert int(caught.value.details["wanted"]) == int(total) * 6 // 10


@pytest.mark.parametrize("unit", ["tokens", "target_tokens"])
@pytest.mark.parametrize(
    "mix",
    [
        {},
        {"total": "20000"},
        {"total": "20000", "policy": "repeat", "max_repeats": 12},
        {"policy": "repeat", "max_repeats": 4},
        {"total": "1500", "policy": "fail"},
    ],
)
def test_by_tokens_shares_are_met_and_no_row_is_tokenized_that_is_not_taken(
    room: PlanningRoom, references: list[Any], unit: str, mix: dict[str, Any]
) -> None:
    data = room.plan(make_spec(references, percentages=SHARES, mix={"unit": unit, **mix}))
    planned = by_dataset(data)
    field = f"num_{unit}"
    amounts = {dataset_id: int(row[field]) for dataset_id, row in planned.items()}
    total = sum(amounts.values())
    for dataset_id, share in SHARES.items():
        assert abs(100 * amounts[dataset_id] / total - share) <= 0.5, amounts
    if "policy" in mix and "total" in mix:
        assert abs(total - int(mix["total"])) <= 60
    rows = used_rows(data)
    distinct = {dataset_id: Counter(rows["reasoning", dataset_id]) for dataset_id in SHARES}
    assert room.num_tokenized == sum(map(len, distinct.values()))
    for dataset_id, row in planned.items():
        assert int(row["num_examples"]) == len(rows["reasoning", dataset_id])
        assert row["num_repeats"] == max(distinct[dataset_id].values()) <= mix.get("max_repeats", 1)
    assert data.plan["data_digest"] == data.compute_digest()


def test_rows_that_are_cut_are_not_taken_for_many_tokens(room: PlanningRoom) -> None:
    """By its bytes the second source is the larger one; it runs out first all the same."""
    long_rows = [{"prompt": str(number), "completion": "1 2 3 4 " * 1000} for number in range(40)]
    references = [room.write(1, write_rows(3000)), room.write(2, long_rows)]
    assert int(references[1]["size_bytes"]) > int(references[0]["size_bytes"])
    data = room.plan(make_spec(references, mix={"unit": "tokens"}, hyperparameters={"max_length": 64}))
    counts = {dataset_id: int(row["num_examples"]) for dataset_id, row in by_dataset(data).items()}
    assert counts[2] == 40
    assert room.num_tokenized == sum(counts.values()) < 150


@pytest.mark.parametrize("turned", [False, True])
def test_bytes_that_tell_nothing_of_tokens_mislead_nobody(room: PlanningRoom, turned: bool) -> None:
    """Tokens of one byte beside tokens of ten: what seems scarce has more than is needed."""
    dense = [{"text": "zq" * 8 + str(number)} for number in range(300)]
    sparse = [{"text": "is" + " assistant" * 25 + str(number)} for number in range(60)]
    references = [room.write(number, rows, "text") for number, rows in enumerate([dense, sparse], 1)]
    assert int(references[0]["size_bytes"]) < int(references[1]["size_bytes"])
    if turned:
        references = [{**references[1], "dataset_id": 1}, {**references[0], "dataset_id": 2}]
    data = room.plan(make_spec(references, mix={"unit": "tokens"}))
    planned = by_dataset(data)
    amounts = [int(row["num_tokens"]) for row in planned.values()]
    assert abs(200 * amounts[0] / sum(amounts) - 100) <= 1
    assert int(planned[1 if turned else 2]["num_examples"]) == 60
    assert room.num_tokenized == sum(int(row["num_examples"]) for row in planned.values()) < 160


def test_a_second_plan_of_the_same_data_tokenizes_nothing(room: PlanningRoom, references: list[Any]) -> None:
    spec = make_spec(references, percentages=SHARES, mix={"unit": "tokens", "total": "1500"})
    first = room.plan(spec)
    room.num_tokenized = 0
    other = room.plan({**spec, "hyperparameters": {"optimizer": {"learning_rate": 0.01}}})
    assert room.num_tokenized == 0
    assert other.plan["data_digest"] == first.plan["data_digest"]


@pytest.mark.parametrize("mix", [{"total": "60"}, {"unit": "tokens"}, {"unit": "tokens", "total": "900"}])
def test_the_digest_does_not_hang_on_what_is_in_the_cache(
    room: PlanningRoom, references: list[Any], mix: dict[str, str]
) -> None:
    wanted = make_spec(references[:2], percentages={1: 50, 2: 50}, mix=mix)
    fresh = room.plan(wanted, cache="fresh")
    room.plan(make_spec(references[:1]), cache="used")  # tokenizes all of the first dataset
    used = room.plan(wanted, cache="used")
    assert used.plan == fresh.plan
    assert used_rows(used) == used_rows(fresh)
    assert used.compute_digest() == fresh.plan["data_digest"]


@pytest.mark.parametrize(
    ("unit", "digest"),
    [
        ("examples", "6e5ebbfcae6cdfd5d9aa44a70279213b838bd7f6af634bcd16ca13d2bac6ce98"),
        ("tokens", "f43ec74c5afd9a8b6894aee8fd96702e04f99f47bfae503bbf610ae167eaf3f0"),
    ],
)
def test_the_digest_is_this_one_on_every_machine(room: PlanningRoom, unit: str, digest: str) -> None:
    """Selection, tokens, masks and packed steps at once. When it changes on purpose, a version in it must change."""
    references = [room.write(1, write_rows(30, seed=1)), room.write(2, write_rows(50, seed=2))]
    hyperparameters = {"batch": {"tokens": "2048"}, "seed": "7"}
    spec = make_spec(references, percentages={1: 75, 2: 25}, mix={"unit": unit}, hyperparameters=hyperparameters)
    assert room.plan(spec).plan["data_digest"] == digest


def test_dropped_rows_are_made_up_for_and_told(room: PlanningRoom) -> None:
    rows = write_rows(200)
    for row in rows[::2]:
        row["prompt"] = "what " * 60
    references = [room.write(1, rows), room.write(2, write_rows(1000, seed=2))]
    spec = make_spec(references, mix={"total": "120"}, hyperparameters={"max_length": 48})
    data = room.plan(spec)
    planned = by_dataset(data)
    assert [int(row["num_examples"]) for row in planned.values()] == [60, 60]
    dropped = int(planned[1]["dropped"]["no_target_tokens"])
    assert dropped > 20
    assert planned[2]["dropped"] == {}
    assert int(planned[1]["num_available"]) == 200 - dropped
    assert room.num_tokenized == 120 + dropped
    # More than are good: the mix falls to what is there.
    fallen = room.plan({**spec, "mix": {"total": "300"}})
    assert [int(row["num_examples"]) for row in by_dataset(fallen).values()] == [100, 100]
    assert by_dataset(fallen)[1]["dropped"] == {"no_target_tokens": "100"}


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_sources_of_nothing_are_legal_at_no_share(room: PlanningRoom, references: list[Any], unit: str) -> None:
    empty = room.write(4, [])
    spec = make_spec([*references[:2], empty], percentages={1: 100, 2: 0, 4: 0}, mix={"unit": unit})
    data = room.plan(spec)
    assert room.num_tokenized == 100
    assert {key: int(row["num_examples"]) for key, row in by_dataset(data).items()} == {1: 100, 2: 0, 4: 0}
    with pytest.raises(Refusal) as caught:
        room.plan(make_spec([references[0], empty], mix={"unit": unit}))
    assert (caught.value.reason, caught.value.details["dataset_id"]) == ("MIX_INFEASIBLE", "4")


@pytest.mark.parametrize("at_once", [500_000, 3])
def test_duplicates_are_counted_and_repeats_are_none(
    room: PlanningRoom, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(selection, "_DUPLICATES_AT_ONCE", at_once)
    rows = write_rows(10)
    references = [room.write(1, rows + rows[:3] + rows[:1]), room.write(2, rows)]
    data = room.plan(make_spec(references))
    assert int(data.plan["num_duplicates"]) == 4 - _left_out(data, 1)
    spec = make_spec(references[1:], mix={"policy": "repeat", "max_repeats": 3})
    assert int(room.plan(spec).plan["num_duplicates"]) == 0


def _left_out(data: PlannedData, dataset_id: int) -> int:
    """Copies of which one was not taken, since half of the mix is smaller than the dataset."""
    contents = Counter(row if row < 10 else [0, 1, 2, 0][row - 10] for row in used_rows(data)["reasoning", dataset_id])
    return 4 - sum(count - 1 for count in contents.values())


def test_planning_holds_little_of_a_large_source(room: PlanningRoom, references: list[Any]) -> None:
    room.plan(make_spec(references[:1]))  # what is loaded once
    tracemalloc.start()
    try:
        room.plan(make_spec(references, percentages=SHARES))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert int(references[2]["size_bytes"]) > 2_000_000
    assert peak_bytes < 1_500_000
