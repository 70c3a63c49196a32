"""Steps of tokens: every example once an epoch, none above the limit, full, and the same on every run."""

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.domain.packing import WINDOW_EXAMPLES, PackedRun, TooManyExamples, pack


def pack_epochs(lengths: list[int], *, tokens: int, seed: int = 0, epochs: float = 1.0) -> PackedRun:
    total = max(1, round(epochs * len(lengths)))
    return pack(lengths, tokens_per_step=tokens, seed=seed, total_examples=total, num_steps=None, most_examples=10**6)


def steps_of(run: PackedRun) -> list[list[int]]:
    return [list(run.places[start:end]) for start, end in itertools.pairwise(run.offsets)]


def log_normal_lengths(count: int) -> list[int]:
    """Mean about 350, cut at 2,048: what conversations look like."""
    source = random.Random(20261122)
    return [max(8, min(2048, int(source.lognormvariate(5.55, 0.8)))) for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=120),
    st.integers(64, 200),
    st.integers(0, 2**63 - 1),
    st.integers(1, 3),
)
def test_every_example_is_in_one_step_of_each_epoch_and_no_step_is_above_the_limit(
    lengths: list[int], tokens: int, seed: int, epochs: int
) -> None:
    run = pack_epochs(lengths, tokens=tokens, seed=seed, epochs=epochs)
    steps = steps_of(run)
    assert Counter(place for step in steps for place in step) == dict.fromkeys(range(len(lengths)), epochs)
    assert all(0 < sum(lengths[place] for place in step) <= tokens for step in steps)
    again = pack_epochs(list(lengths), tokens=tokens, seed=seed, epochs=epochs)
    assert (again.places, again.offsets) == (run.places, run.offsets)
    # No better than the tokens allow, and no worse than if all were of the greatest length.
    assert math.ceil(epochs * sum(lengths) / tokens) <= run.num_steps <= -(-epochs * len(lengths) // (tokens // 64))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_asking_for_steps_gives_the_first_of_the_same_steps(seed: int, num_steps: int) -> None:
    lengths = log_normal_lengths(50)
    whole = steps_of(pack_epochs(lengths, tokens=4096, seed=seed, epochs=20))
    run = pack(lengths, tokens_per_step=4096, seed=seed, total_examples=None, num_steps=num_steps, most_examples=10**6)
    assert steps_of(run) == whole[:num_steps]


@pytest.mark.parametrize("tokens", [2048, 4096, 8192, 32768])
def test_steps_are_98_percent_full_on_a_log_normal_mix(tokens: int) -> None:
    lengths = log_normal_lengths(10_000)
    run = pack_epochs(lengths, tokens=tokens)
    assert sum(lengths) / (run.num_steps * tokens) >= 0.98


def test_an_epoch_is_over_before_the_next_begins() -> None:
    """What comes of one epoch is in steps before those that are of the next alone."""
    lengths = log_normal_lengths(3000)
    run = pack_epochs(lengths, tokens=4096, epochs=2)
    assert sorted(run.places[:3000]) == list(range(3000))
    assert list(run.places[:3000]) != list(run.places[3000:])


def test_long_examples_do_not_come_first() -> None:
    """A window is placed from the longest on; its steps are put in another order."""
    lengths = log_normal_lengths(WINDOW_EXAMPLES)
    steps = steps_of(pack_epochs(lengths, tokens=2048))
    longest = [max(lengths[place] for place in step) for step in steps]
    half = len(longest) // 2
    assert abs(sum(longest[:half]) / half - sum(longest[half:]) / (len(longest) - half)) < 300


def test_a_step_larger_than_a_window_is_filled_by_several() -> None:
    lengths = [10] * (5 * WINDOW_EXAMPLES)
    run = pack_epochs(lengths, tokens=20 * WINDOW_EXAMPLES)
    assert [len(step) for step in steps_of(run)] == [2048, 2048, 1024]


def test_a_step_that_nothing_fits_is_not_carried_for_ever() -> None:
    lengths = [60] * (3 * WINDOW_EXAMPLES)
    run = pack_epochs(lengths, tokens=100)
    order = [place for step in steps_of(run) for place in step]
    assert set(order[: WINDOW_EXAMPLES - 1]).isdisjoint(order[2 * WINDOW_EXAMPLES :])
    assert run.num_steps == len(lengths)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="longer"):
        pack_epochs([5, 101], tokens=100)
    with pytest.raises(TooManyExamples):
        pack([5], tokens_per_step=10, seed=0, total_examples=None, num_steps=10**9, most_examples=1000)
