"""A total that falls: shares hold whichever source runs out, and nothing is read that is not taken."""

import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.planner.drawing import Draw
from gpu_service.planner.lockstep import draw_in_lockstep
from gpu_service.planner.token_store import RowTokens

LONGEST = 60


class Rows:
    """Rows by their tokens, 0 for one that is left out, and by bytes that tell nothing of them."""

    def __init__(self, lengths: list[int], *, seed: int) -> None:
        self.lengths = lengths
        self.num_bytes = [random.Random(seed).randrange(1, 500) for _ in lengths]
        self.readings: list[int] = []

    def read(self, rows: list[int]) -> list[RowTokens]:
        self.readings.append(len(rows))
        return [
            RowTokens(row, self.lengths[row], -(-self.lengths[row] // 2))
            if self.lengths[row]
            else RowTokens(None, dropped_reason="no_target_tokens")
            for row in rows
        ]

    def row_bytes(self, row: int) -> int:
        return self.num_bytes[row]

    def draw(self, unit: str) -> Draw:
        store: Any = self
        rows = iter(range(len(self.lengths)))
        return Draw(store, store, rows, num_rows=len(self.lengths), unit=unit, most_per_row=LONGEST)


def make_lengths(kind: str, count: int, chance: random.Random) -> list[int]:
    """So many rows, of which at least one is an example."""
    of_kind = {
        "any": lambda at: chance.randrange(LONGEST + 1),
        "few long ones": lambda at: LONGEST if chance.random() < 0.05 else 1,
        "short": lambda at: chance.randrange(1, 5),
        "mostly dropped": lambda at: chance.choice([0, 0, 0, LONGEST]),
        "long ones last": lambda at: 1 if at < count // 2 else LONGEST,
        "short ones last": lambda at: LONGEST if at < count // 2 else 1,
    }[kind]
    return [30, *map(of_kind, range(1, count))]


KINDS = ("any", "few long ones", "short", "mostly dropped", "long ones last", "short ones last")


def miss(draws: list[Draw], shares: list[Fraction]) -> list[Fraction]:
    """By how much each amount misses its share of them all."""
    realized = sum(draw.amount for draw in draws)
    return [abs(draw.amount - share * realized) for draw, share in zip(draws, shares, strict=True)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(1, 120), st.sampled_from([1, 3, 30])), min_size=1, max_size=5
    ),
    st.one_of(st.none(), st.integers(1, 5000)),
    st.sampled_from(["tokens", "target_tokens"]),
    st.integers(0, 1 << 30),
)
def test_no_share_is_missed_by_more_than_the_bound(
    sources: list[tuple[str, int, int]], total: int | None, unit: str, seed: int
) -> None:
    chance = random.Random(seed)
    rows = [Rows(make_lengths(kind, count, chance), seed=at) for at, (kind, count, _) in enumerate(sources)]
    draws = [row.draw(unit) for row in rows]
    shares = [Fraction(weight, sum(weight for *_, weight in sources)) for *_, weight in sources]
    left = draw_in_lockstep(draws, shares, total=None if total is None else Fraction(total), repeats=1)
    assert total is None or left <= total
    for share, missed in zip(shares, miss(draws, shares), strict=True):
        assert missed <= 2 * LONGEST * (1 + len(draws) * share)
    # It fell to what one of them has, and no further than it must.
    if left != total:
        assert left == min(draw.amount / share for draw, share in zip(draws, shares, strict=True) if draw.exhausted)
    assert [sum(row.readings) for row in rows] == [len(draw) + sum(draw.dropped.values()) for draw in draws]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(20, 60), st.sampled_from([2, 3, 10])), min_size=2, max_size=3
    ),
    st.integers(0, 1 << 30),
)
def test_of_much_data_shares_hold_within_half_a_point(sources: list[tuple[str, int, int]], seed: int) -> None:
    """Any source may be the one that runs out: each has at least its share of 1,000 longest rows for each source."""
    chance = random.Random(seed)
    shares = [Fraction(weight, sum(weight for *_, weight in sources)) for *_, weight in sources]
    rows = []
    for at, (kind, spread, _) in enumerate(sources):
        lengths = make_lengths(kind, 2000, chance)
        needed = 800 * LONGEST * (1 + len(sources) * max(shares)) * shares[at] * spread / 20
        rows.append(Rows(lengths * -int(-needed // sum(lengths)), seed=at))
    draws = [row.draw("tokens") for row in rows]
    draw_in_lockstep(draws, shares, total=None, repeats=1)
    realized = sum(draw.amount for draw in draws)
    assert max(miss(draws, shares)) / realized <= Fraction(5, 1000)


@pytest.mark.parametrize("kinds", [("short ones last", "any"), ("any", "short ones last")])
def test_who_seemed_to_have_the_most_may_run_out_first(kinds: tuple[str, str]) -> None:
    """The first half of the rows promises twice what the second half holds."""
    chance = random.Random(1)
    draws = [Rows(make_lengths(kind, 2000, chance), seed=at).draw("tokens") for at, kind in enumerate(kinds)]
    shares = [Fraction(1, 2)] * 2
    draw_in_lockstep(draws, shares, total=None, repeats=1)
    assert max(miss(draws, shares)) <= LONGEST


def test_what_repeats_is_drawn_no_further_than_is_needed() -> None:
    """100 tokens six times for 60 %: the others give 300 and 100 of theirs without a repeat."""
    rows = [Rows([10] * count, seed=1) for count in (10, 1000, 1000)]
    draws = [row.draw("tokens") for row in rows]
    shares = [Fraction(6, 10), Fraction(3, 10), Fraction(1, 10)]
    assert draw_in_lockstep(draws, shares, total=None, repeats=6) == 1000
    assert [draw.amount for draw in draws] == [100, 300, 100]


def test_long_sources_are_read_in_large_steps() -> None:
    rows = [Rows([LONGEST] * 100_000, seed=1) for _ in range(2)]
    draw_in_lockstep([row.draw("tokens") for row in rows], [Fraction(1, 2)] * 2, total=None, repeats=1)
    assert max(len(row.readings) for row in rows) < 2000
