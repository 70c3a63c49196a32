"""Drawing stops where it should and reads no row more; shares hold in every unit."""

from fractions import Fraction
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.planner.drawing import Draw
from gpu_service.planner.token_store import RowTokens


class Rows:
    """Rows of given lengths; a length of 0 is a row that is left out. Both store and index."""

    def __init__(self, lengths: list[int], bytes_per_token: int = 4) -> None:
        self.lengths = lengths
        self.bytes_per_token = bytes_per_token
        self.read_rows: list[int] = []

    def read(self, rows: list[int]) -> list[RowTokens]:
        self.read_rows += rows
        return [
            RowTokens(row, self.lengths[row], max(1, self.lengths[row] // 2))
            if self.lengths[row]
            else RowTokens(None, dropped_reason="no_target_tokens")
            for row in rows
        ]

    def row_bytes(self, row: int) -> int:
        return 1 + self.bytes_per_token * self.lengths[row]

    def draw(self, unit: str, most_per_row: int = 100) -> Draw:
        store: Any = self
        rows = iter(range(len(self.lengths)))
        return Draw(store, store, rows, num_rows=len(self.lengths), unit=unit, most_per_row=most_per_row)


LENGTHS = st.lists(st.integers(0, 100), min_size=1, max_size=200)


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 250))
def test_examples_are_drawn_exactly(lengths: list[int], count: int) -> None:
    rows = Rows(lengths)
    draw = rows.draw("examples")
    draw.draw_examples(count)
    good = [row for row, length in enumerate(lengths) if length]
    assert list(draw.examples) == good[:count]
    dropped = sum(draw.dropped.values())
    assert len(rows.read_rows) == len(draw) + dropped
    if count and len(good) >= count:
        assert rows.read_rows[-1] == good[count - 1]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 8000), st.sampled_from(["tokens", "target_tokens"]))
def test_a_share_of_tokens_is_met_within_an_example_and_no_row_is_read_in_vain(
    lengths: list[int], wanted: int, unit: str
) -> None:
    rows = Rows(lengths)
    draw = rows.draw(unit)
    draw.draw_amount(Fraction(wanted))
    assert draw.amount == sum(draw.amounts())
    assert len(rows.read_rows) == len(draw) + sum(draw.dropped.values())
    if not draw.exhausted:
        assert abs(draw.amount - wanted) <= 100
    # All but the last are needed.
    assert not len(draw) or draw.amount - draw.amounts()[-1] < wanted


def test_the_last_row_is_judged_by_its_bytes() -> None:
    """Rows of 10 tokens and 95 wanted: half a row is as near, less than half is not."""
    for wanted, count in ((94, 9), (95, 10), (96, 10), (100, 10), (101, 10)):
        rows = Rows([10] * 50)
        draw = rows.draw("tokens", most_per_row=10)
        draw.draw_amount(Fraction(wanted))
        assert len(draw) == len(rows.read_rows) == count


def test_all_rows_are_drawn_when_no_amount_is_named() -> None:
    draw = Rows([10, 0, 20]).draw("tokens")
    assert draw.draw_towards(None, most_rows=3)
    assert (draw.amount, draw.exhausted, draw.num_available) == (30, True, 2)
    assert [draw.count_nearest(Fraction(amount)) for amount in (0, 4, 6, 19, 20, 21, 99)] == [0, 0, 1, 1, 2, 2, 2]
