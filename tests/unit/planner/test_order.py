"""The permutation is a bijection, the same for ever, and mixes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.domain.order import Permutation

PINNED_TEN = [2, 7, 6, 1, 8, 3, 5, 9, 4, 0]
PINNED_MILLION = [834426, 287807, 46443, 296822, 727645]


@settings(max_examples=40)
@given(st.integers(0, 300), st.integers(0, 2**63 - 1), st.sampled_from(["epoch 0", "epoch 1", "select a"]))
def test_every_item_comes_once(length: int, seed: int, purpose: str) -> None:
    assert sorted(Permutation(length, seed=seed, purpose=purpose)) == list(range(length))


def test_it_never_changes() -> None:
    """Pinned: another order would make a resumed run see other data, and needs another ORDER_VERSION."""
    assert list(Permutation(10, seed=0, purpose="epoch 0")) == PINNED_TEN
    permutation = Permutation(1_000_000, seed=7, purpose="select")
    assert [permutation[position] for position in range(5)] == PINNED_MILLION


def test_seed_purpose_and_length_matter() -> None:
    first = list(Permutation(100, seed=1, purpose="epoch 0"))
    assert first != list(Permutation(100, seed=2, purpose="epoch 0"))
    assert first != list(Permutation(100, seed=1, purpose="epoch 1"))
    assert first != [item for item in Permutation(101, seed=1, purpose="epoch 0") if item < 100]


def test_small_lengths_reach_every_order() -> None:
    seen = {tuple(Permutation(3, seed=seed, purpose="epoch 0")) for seed in range(60)}
    assert len(seen) == 6


def test_positions_are_spread_evenly() -> None:
    length, trials = 8, 1600
    counts = [0] * length
    for seed in range(trials):
        counts[Permutation(length, seed=seed, purpose="epoch 0")[0]] += 1
    # Chi-square with 7 degrees of freedom; 29.9 is the 0.9999 quantile, and the seeds are fixed.
    expected = trials / length
    assert sum((count - expected) ** 2 / expected for count in counts) < 29.9


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError):
        Permutation(10, seed=0, purpose="epoch 0")[position]


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        Permutation(-1, seed=0, purpose="epoch 0")
