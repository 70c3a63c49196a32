"""Shares hold in every unit and under every policy, whatever the rows are; what cannot be met is refused by name."""

from collections import Counter
from collections.abc import Collection
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.domain.defaults import ResolvedMix
from gpu_service.domain.errors import Refusal
from gpu_service.domain.mix import compute_sources
from gpu_service.domain.spec import DatasetReference, TrainingSpec, Trait, TraitDataset
from gpu_service.planner.choosing import Chooser, ChosenSource
from gpu_service.planner.token_store import RowTokens

LONGEST = 60


class FakeRows:
    """Rows by their tokens, 0 for one that is left out: store, index and shard of one dataset.

    With `lies`, rows of many tokens have few bytes, and those of few have many.
    """

    def __init__(self, lengths: list[int], *, lies: bool = False) -> None:
        self.lengths = lengths
        self.lies = lies
        self.num_rows = len(lengths)
        self.num_bytes = sum(map(self.row_bytes, range(len(lengths))))
        self.read_rows: list[int] = []

    def row_bytes(self, row: int) -> int:
        return 3 + 4 * (2 * LONGEST - self.lengths[row] if self.lies else self.lengths[row])

    def read(self, rows: list[int]) -> list[RowTokens]:
        self.read_rows += rows
        return [
            RowTokens(row, self.lengths[row], -(-self.lengths[row] // 2))
            if self.lengths[row]
            else RowTokens(None, dropped_reason="no_target_tokens")
            for row in rows
        ]


def choose(
    datasets: dict[int, list[int]], percentages: list[int], mix: ResolvedMix, *, lying: Collection[int] = ()
) -> list[ChosenSource]:
    """Sources of one trait, chosen by the real chooser over rows that are only numbers.

    Where tokens are counted, every row that was read must have been taken, or dropped by a rule.
    """
    rows = {dataset_id: FakeRows(lengths, lies=dataset_id in lying) for dataset_id, lengths in datasets.items()}
    trait = Trait(
        trait_type="a",
        datasets=tuple(
            TraitDataset(dataset_id=dataset_id, percentage=percentage)
            for dataset_id, percentage in zip(datasets, percentages, strict=True)
        ),
    )
    references = tuple(
        DatasetReference(dataset_id=dataset_id, sha256=f"sha {dataset_id}", num_examples=len(lengths))
        for dataset_id, lengths in datasets.items()
    )
    stores: Any = SimpleNamespace(
        index=lambda reference: rows[reference.dataset_id],
        open_whole=lambda reference: rows[reference.dataset_id],
        open_drawn=lambda reference, purpose: rows[reference.dataset_id],
    )
    checked: Any = SimpleNamespace(
        mix=mix,
        hyperparameters=SimpleNamespace(seed=0, max_length=LONGEST),
        longest_possible_tokens=LONGEST,
        sources=tuple(compute_sources([trait])),
        datasets=(),
    )
    sources, _ = Chooser(TrainingSpec(traits=(trait,), datasets=references), checked, stores).choose()
    if mix.unit != "examples":
        for source in sources:
            read = rows[source.plan.dataset_id].read_rows
            assert len(read) == len(set(read)) == len(set(source.positions)) + sum(source.plan.dropped.values())
    return sources


def amount(source: ChosenSource, unit: str) -> int:
    amounts = {
        "examples": source.plan.num_examples,
        "tokens": source.plan.num_tokens,
        "target_tokens": source.plan.num_target_tokens,
    }
    return amounts[unit]


def capacity(lengths: list[int], unit: str) -> int:
    good = [length for length in lengths if length]
    return {"examples": len(good), "tokens": sum(good), "target_tokens": sum(-(-length // 2) for length in good)}[unit]


@st.composite
def mixes(draw: st.DrawFn) -> tuple[dict[int, list[int]], list[int]]:
    count = draw(st.integers(1, 4))
    datasets = {
        dataset_id: draw(st.lists(st.integers(0, LONGEST), min_size=1, max_size=40).filter(any))
        for dataset_id in range(1, count + 1)
    }
    cuts = sorted(draw(st.lists(st.integers(0, 100), min_size=count - 1, max_size=count - 1)))
    percentages = [end - start for start, end in zip([0, *cuts], [*cuts, 100], strict=True)]
    return datasets, percentages


@settings(max_examples=120, deadline=None)
@given(
    mixes(),
    st.sampled_from(["examples", "tokens", "target_tokens"]),
    st.one_of(st.none(), st.integers(1, 3000)),
    st.sampled_from(["shrink", "repeat", "fail"]),
    st.integers(1, 4),
    st.sets(st.integers(1, 4)),
)
def test_shares_hold_within_a_unit_and_policies_are_kept(
    drawn: tuple[dict[int, list[int]], list[int]],
    unit: str,
    total: int | None,
    policy: str,
    max_repeats: int,
    lying: set[int],
) -> None:
    datasets, percentages = drawn
    repeats = max_repeats if policy == "repeat" else 1
    mix = ResolvedMix(unit=unit, total=total, policy=policy, max_repeats=max_repeats)
    wanted = {
        dataset_id: None if total is None else Fraction(percentage * total, 100)
        for dataset_id, percentage in zip(datasets, percentages, strict=True)
    }
    # By examples a share is rounded up at most to the next whole one.
    slack = 1 if unit == "examples" else 0
    try:
        sources, refusal = choose(datasets, percentages, mix, lying=lying), None
    except Refusal as error:
        refusal = error
    if refusal is not None:
        if refusal.reason == "NO_EXAMPLES_LEFT":  # the largest total rounds to no example
            assert (unit, total) == ("examples", None)
            return
        assert refusal.reason == "MIX_INFEASIBLE"
        assert policy != "shrink"
        named = int(refusal.details["dataset_id"])
        part = wanted[named]
        assert part is not None
        assert part + slack > repeats * capacity(datasets[named], unit)
        return
    amounts = {source.plan.dataset_id: amount(source, unit) for source in sources}
    realized = sum(amounts.values())
    step = 1 if unit == "examples" else LONGEST
    assert total is None or realized <= total + step * len(amounts)
    for source in sources:
        dataset_id = source.plan.dataset_id
        share = Fraction(percentages[dataset_id - 1], 100)
        assert abs(amounts[dataset_id] - share * realized) <= step * (1 + share * len(amounts))
        counted = Counter(source.positions)
        assert max(counted.values(), default=0) == source.plan.num_repeats <= repeats
        if policy != "shrink" and total is not None:
            assert abs(amounts[dataset_id] - share * total) <= step
        # Every example is seen as often as any other, or once less.
        assert set(counted.values()) <= {source.plan.num_repeats, source.plan.num_repeats - 1}


@pytest.mark.parametrize("unit", ["examples", "tokens", "target_tokens"])
def test_the_source_that_runs_out_first_sets_the_total_whichever_it_seems_to_be(unit: str) -> None:
    """Half of the first one's rows are left out, which only reading them tells."""
    datasets = {1: [0, 40] * 20, 2: [20] * 45}
    sources = choose(datasets, [50, 50], ResolvedMix(unit=unit, total=None, policy="shrink", max_repeats=1))
    amounts = [amount(source, unit) for source in sources]
    assert amounts == {"examples": [20, 20], "tokens": [800, 800], "target_tokens": [400, 400]}[unit]
    turned = choose(
        {1: datasets[2], 2: datasets[1]}, [50, 50], ResolvedMix(unit=unit, total=None, policy="shrink", max_repeats=1)
    )
    # By examples 41 are halved; the one that is left goes to the lower id, which has it now.
    assert [amount(source, unit) for source in turned] == ([21, 20] if unit == "examples" else amounts)
