"""Batches of tokens as plans have them: listed steps, what they come to, refusals, and what level CHECK says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gpu_service.domain.checked_plan import CheckedPlan
from gpu_service.domain.errors import Refusal
from gpu_service.domain.planned_data import PlannedData, PlannedDataDamaged
from tests.fakes.checked_specs import make_spec as make_checked_spec
from tests.fakes.checked_specs import plan as check
from tests.fakes.datasets import make_spec
from tests.fakes.plans import PlanningRoom, write_rows


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanningRoom:
    return PlanningRoom(tmp_path, monkeypatch)


def plan_tokens(room: PlanningRoom, tokens: int = 256, count: int = 600, **hyperparameters: Any) -> PlannedData:
    references = [room.write(1, write_rows(count, words=12))]
    values = {"batch": {"tokens": str(tokens)}, "max_length": 128, **hyperparameters}
    return room.plan(make_spec(references, hyperparameters=values))


def lengths(data: PlannedData) -> list[list[int]]:
    return [[len(data.example(item).tokens) for item in data.step_examples(step)] for step in range(data.num_steps)]


def test_the_plan_says_what_its_steps_hold(room: PlanningRoom) -> None:
    data = plan_tokens(room, num_epochs=2)
    plan, steps = data.plan, lengths(data)
    flat = [length for step in steps for length in step]
    assert max(map(sum, steps)) == int(plan["largest_step_tokens"]) <= 256
    assert max(flat) == int(plan["longest_example_tokens"])
    assert sum(flat) == int(plan["total_tokens"]) == 2 * int(plan["tokens_per_epoch"])
    assert len(flat) == int(plan["total_examples"]) == 1200
    assert plan["fill"] == pytest.approx(sum(flat) / (256 * len(steps)))
    assert plan["fill"] >= 0.98
    assert int(plan["num_steps"]) == data.num_steps == len(steps)
    assert plan["resolved"]["batch"] == {"tokens": "256"}
    seen = Counter(item for step in range(data.num_steps) for item in data.step_examples(step))
    assert set(seen.values()) == {2}
    assert data.epoch_of_step(0) == 0.0
    assert data.epoch_of_step(data.num_steps) == plan["num_epochs"] == 2.0
    assert 0 < data.epoch_of_step(1) < 0.1
    assert data.compute_digest() == plan["data_digest"]
    assert data.compute_digest(data.num_steps - 1) != plan["data_digest"]
    for outside in (-1, data.num_steps):
        with pytest.raises(IndexError):
            data.step_examples(outside)


@pytest.mark.parametrize("num_steps", [1, 7, 300])
def test_num_steps_are_met_over_as_many_epochs_as_it_takes(room: PlanningRoom, num_steps: int) -> None:
    data = plan_tokens(room, num_steps=str(num_steps))
    assert data.num_steps == num_steps
    assert data.plan["num_epochs"] == pytest.approx(data.total_examples / 600)
    assert data.plan["fill"] >= 0.98


def test_membership_is_in_the_digest_and_the_same_again(room: PlanningRoom) -> None:
    digests = {
        plan_tokens(room, tokens=tokens, seed=str(seed)).plan["data_digest"]
        for tokens, seed in ((256, 0), (256, 1), (512, 0))
    }
    assert len(digests) == 3
    first, again = plan_tokens(room), plan_tokens(room)
    steps = range(first.num_steps)
    assert [first.step_examples(step) for step in steps] == [again.step_examples(step) for step in steps]


def test_a_batch_without_room_for_max_length_is_refused() -> None:
    for values in (
        {"batch": {"tokens": "100"}, "max_length": 101},
        {"batch": {"tokens": "511"}},  # max_length is the model's 512 then
        {"batch": {"tokens": "150"}, "max_length": 100, "objective": "dpo"},
    ):
        spec = make_checked_spec(hyperparameters=values)
        if "objective" in values:
            spec["datasets"] = [{**item, "format": "preference"} for item in spec["datasets"]]
        with pytest.raises(Refusal) as caught:
            check(spec)
        assert (caught.value.reason, caught.value.field) == ("INVALID_FIELD", "hyperparameters.batch.tokens")
        assert "max_length" in caught.value.message


def test_a_run_of_too_many_listed_examples_is_refused(room: PlanningRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_service.planner.selection.MAXIMUM_EXAMPLES_PER_EPOCH", 1000)
    with pytest.raises(Refusal) as caught:
        plan_tokens(room, num_steps="1000000")
    assert (caught.value.reason, caught.value.field) == ("TOO_LARGE", "hyperparameters.num_steps")


@pytest.mark.parametrize("name", ["steps.bin", "step_offsets.bin", "held_out.bin"])
def test_damaged_steps_are_named(room: PlanningRoom, name: str) -> None:
    plan_tokens(room)
    [directory] = (room.root / "cache/plans").iterdir()
    path = directory / name
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(PlannedDataDamaged, match=name.replace(".", r"\.")):
        PlannedData.open(directory)
    if content:
        path.write_bytes(b"\xff" * len(content))
        with pytest.raises(PlannedDataDamaged, match=name.replace(".", r"\.")):
            PlannedData.open(directory)


def checked(**changes: Any) -> CheckedPlan:
    return check(make_checked_spec(**changes))


def test_at_level_check_counts_are_upper_bounds_and_say_so(room: PlanningRoom) -> None:
    references = [room.write(1, write_rows(300)), room.write(2, write_rows(500, seed=2))]
    for mix in ({"unit": "tokens"}, {"unit": "target_tokens", "total": "900"}, {"unit": "tokens", "total": "70"}):
        spec = make_spec(references, mix=mix, hyperparameters={"batch": {"tokens": "256"}, "max_length": 64})
        bounds = check({**make_checked_spec(), **json.loads(json.dumps(spec))})
        exact = room.plan(spec).plan
        assert bounds.num_steps >= int(exact["num_steps"])
        assert bounds.total_examples >= int(exact["total_examples"])
        for bound, row in zip(bounds.datasets, exact["datasets"], strict=True):
            assert bound.num_examples >= int(row["num_examples"])
            assert (bound.num_tokens, bound.num_target_tokens) == (0, 0)
        assert sum("upper bound" in warning for warning in bounds.warnings) == 2
        assert not any("upper bound" in warning for warning in exact["warnings"])


def test_level_check_of_steps_that_were_asked_for_is_exact() -> None:
    plan = checked(hyperparameters={"batch": {"tokens": "4096"}, "num_steps": "30"})
    assert (plan.num_steps, plan.total_examples, plan.num_epochs) == (30, 0, 0.0)
    plan = checked(hyperparameters={"batch": {"tokens": "4096"}, "num_epochs": 2})
    # 120 examples twice, at least 8 of 512 tokens a step.
    assert (plan.num_steps, plan.num_epochs) == (30, 2.0)
