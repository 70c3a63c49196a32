"""Shares and percentages become counts, exactly."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service.domain.errors import Refusal
from gpu_service.domain.mix import MixSource, allocate, apportion, compute_sources, find_largest_total
from gpu_service.domain.spec import Trait, TraitDataset


def make_trait(name: str, *percentages: float, weight: float | None = None, first_id: int = 1) -> Trait:
    datasets = tuple(
        TraitDataset(dataset_id=first_id + at, percentage=percentage) for at, percentage in enumerate(percentages)
    )
    return Trait(trait_type=name, weight=weight, datasets=datasets)


AVAILABLE = [100, 10_000, 1_000_000]
SOURCES = compute_sources([make_trait("reasoning", 60, 30, 10)])


@pytest.mark.parametrize(
    ("total", "policy", "max_repeats", "counts"),
    [
        (1000, "shrink", 1, [100, 50, 17]),
        (1000, "repeat", 6, [600, 300, 100]),
        (None, "shrink", 1, [100, 50, 17]),
        (None, "fail", 1, [100, 50, 17]),
        (None, "repeat", 6, [600, 300, 100]),
        (100, "shrink", 1, [60, 30, 10]),
        (100, "fail", 1, [60, 30, 10]),
    ],
)
def test_policies(total: int | None, policy: str, max_repeats: int, counts: list[int]) -> None:
    allocated = allocate(SOURCES, AVAILABLE, total=total, policy=policy, max_repeats=max_repeats)
    if total is None and policy == "repeat":
        # The largest total that six repeats allow is a little more than 1,000.
        assert allocated[0] == 600
        assert sum(allocated) >= 1000
    else:
        assert allocated == counts


@pytest.mark.parametrize(("policy", "max_repeats"), [("fail", 1), ("repeat", 5)])
def test_what_cannot_be_met_names_the_first_source(policy: str, max_repeats: int) -> None:
    with pytest.raises(Refusal) as caught:
        allocate(SOURCES, AVAILABLE, total=1000, policy=policy, max_repeats=max_repeats)
    assert caught.value.reason == "MIX_INFEASIBLE"
    assert caught.value.details["dataset_id"] == "1"
    assert caught.value.details["wanted"] == "600"


def test_ties_go_to_the_lower_dataset_id() -> None:
    traits = [make_trait("b", 100, first_id=1), make_trait("a", 100, first_id=2)]
    sources = compute_sources(traits)
    assert [source.dataset_id for source in sources] == [2, 1]
    assert apportion(sources, 3) == [1, 2]


def test_weights_and_percentages_multiply() -> None:
    sources = compute_sources([make_trait("a", 25, 75, weight=3), make_trait("b", 100, weight=1, first_id=3)])
    assert [source.share for source in sources] == [Fraction(3, 16), Fraction(9, 16), Fraction(1, 4)]


def test_an_empty_source_is_legal_at_no_share_and_refused_otherwise() -> None:
    sources = compute_sources([make_trait("a", 0, 100)])
    assert allocate(sources, [0, 7], total=None, policy="shrink", max_repeats=1) == [0, 7]
    with pytest.raises(Refusal, match="dataset 2"):
        allocate(sources, [5, 0], total=None, policy="shrink", max_repeats=1)


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        ([make_trait("a", 60, 39)], "PERCENTAGES_NOT_100"),
        ([make_trait("a", 60, 40.02)], "PERCENTAGES_NOT_100"),
        ([make_trait("a")], "PERCENTAGES_NOT_100"),
        ([make_trait("a", 100, weight=0), make_trait("b", 100, weight=0)], "WEIGHTS_ALL_ZERO"),
        ([make_trait("a", 100, weight=-1), make_trait("b", 100, weight=2)], "INVALID_FIELD"),
        ([make_trait("a", -50, 150)], "INVALID_FIELD"),
        ([], "INVALID_FIELD"),
    ],
)
def test_bad_mixes(traits: list[Trait], reason: str) -> None:
    with pytest.raises(Refusal) as caught:
        compute_sources(traits)
    assert caught.value.reason == reason


def test_percentages_within_the_tolerance_count_in_proportion() -> None:
    sources = compute_sources([make_trait("a", 33.33, 33.33, 33.33)])
    assert sum(source.share for source in sources) == 1
    assert apportion(sources, 9) == [3, 3, 3]


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[MixSource], list[int]]:
    weights = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
    sources = [
        MixSource(trait_type="t", dataset_id=at, share=Fraction(weight, sum(weights)))
        for at, weight in enumerate(weights)
    ]
    limits = draw(st.lists(st.integers(0, 12), min_size=len(weights), max_size=len(weights)))
    return sources, limits


@given(mixes(), st.integers(0, 10_000))
def test_apportionment_adds_up_and_stays_within_one_of_the_quota(
    mix: tuple[list[MixSource], list[int]], total: int
) -> None:
    sources, _ = mix
    counts = apportion(sources, total)
    assert sum(counts) == total
    assert all(abs(count - source.share * total) < 1 for source, count in zip(sources, counts, strict=True))


@given(mixes())
def test_the_largest_total_is_the_largest(mix: tuple[list[MixSource], list[int]]) -> None:
    sources, limits = mix
    found = find_largest_total(sources, limits)

    def fits(total: int) -> bool:
        return all(count <= limit for count, limit in zip(apportion(sources, total), limits, strict=True))

    assert fits(found)
    # Nothing above the least of these keeps every rounded-down quota within its limit.
    bounds = [(limit + 1) / source.share for source, limit in zip(sources, limits, strict=True) if source.share]
    assert not any(fits(total) for total in range(found + 1, int(min(bounds)) + 2))


def test_a_tiny_share_does_not_take_forever() -> None:
    sources = [
        MixSource(trait_type="t", dataset_id=1, share=Fraction(1, 10**9)),
        MixSource(trait_type="t", dataset_id=2, share=1 - Fraction(1, 10**9)),
    ]
    found = find_largest_total(sources, [3, 10**12])
    assert apportion(sources, found)[0] == 3
    assert apportion(sources, found + 1)[0] == 4
