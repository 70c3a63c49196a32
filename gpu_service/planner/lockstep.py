"""Draws the sources of a mix of tokens side by side, for a total that falls to what the scarcest of them allows.

Which one runs out first is known only when it has. So the source that is furthest behind its share is always drawn
next, and none gets so far ahead that what was drawn of it would not be taken. Reads no byte to guess a token count;
judges nothing by a clock, a cache or a device, so that everyone draws the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gpu_service.planner.drawing import CHUNK_ROWS, Draw

# What one reading may bring, at most, of what was drawn before. Any source may be ahead of another by this part of its
# share, and another behind by as much: up to 0.25 points of shares in all, whatever the rows are.
_LARGEST_STEP = 200


@dataclass(kw_only=True)
class _Runner:
    """One source on its way. Levels are totals: that at which the source's share is what was drawn of it, repeated."""

    draw: Draw
    share: Fraction
    repeats: int
    # The total that an amount of 1 allows.
    rise: float
    num_rows: int
    complete: bool = False

    @property
    def level(self) -> Fraction:
        return self.draw.amount * self.repeats / self.share

    @property
    def step_rows(self) -> int:
        """How many rows are read at once."""
        return max(1, min(CHUNK_ROWS, self.draw.amount // (_LARGEST_STEP * self.draw.most_per_row)))

    def expect_level(self) -> float:
        """The level at which it will run out, if the rows that are left are like those that were read."""
        rows_read = self.num_rows - self.draw.num_left
        return self.draw.amount * self.rise * self.num_rows / rows_read if rows_read else 0.0

    def place(self, *, leads: bool) -> float:
        """Who is at the lowest place reads next. One that does not lead stays one row more than it reads behind."""
        draw = self.draw
        if leads or not draw.amount:
            return draw.amount * self.rise
        return (draw.amount + (self.step_rows + 1) * draw.amount / len(draw)) * self.rise


def draw_in_lockstep(
    draws: Sequence[Draw], shares: Sequence[Fraction], *, total: Fraction | None, repeats: int
) -> Fraction:
    """Draws until every source has its share of the total, or has run out, and gives the total that is left.

    That is `total` (None: without a limit), or less: what the source that ran out first allows, its rows `repeats`
    times. With `repeats` 1 every row that was drawn belongs to the mix, and no source misses its share of what was
    drawn by more than two of the longest rows, twice more for each source in proportion to its share, and 0.25 points.
    """
    runners = [
        _Runner(
            draw=draw,
            share=share,
            repeats=repeats,
            rise=float(repeats / share),
            num_rows=draw.num_left,
        )
        for draw, share in zip(draws, shares, strict=True)
    ]
    while going := [runner for runner in runners if not runner.complete]:
        # Floats decide who is next, by products and quotients that are the same on every machine.
        leader = min(going, key=_Runner.expect_level)
        runner = min(going, key=lambda runner: runner.place(leads=runner is leader))
        wanted = None if total is None else runner.share * total
        runner.complete = not runner.draw.draw_towards(wanted, most_rows=runner.step_rows)
        if runner.draw.exhausted:
            runner.complete = True
            total = runner.level if total is None else min(total, runner.level)
    assert total is not None
    return total
