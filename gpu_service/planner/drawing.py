"""Rows of one dataset drawn in a seeded order, until there are enough examples or enough tokens of them.

Draws no row that it does not need: where tokens are counted, a row is read only if it must fit, or if its bytes say
that it brings the amount nearer to what is wanted. Decides nothing about how much is wanted.
"""

from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction

from gpu_service.domain.planned_data import TokenShard
from gpu_service.planner.row_index import RowIndex
from gpu_service.planner.token_store import TokenStore

# Rows that are read at once, at most.
CHUNK_ROWS = 4096
# Among so many rows, in their order, the last one is looked for.
_LAST_ROWS = 64


class Draw:
    """What was drawn so far of one dataset for one trait; example `position` is the one that came as that.

    `rows` is the order of drawing, without rows that must not be drawn; `num_rows` is how many these are.
    `most_per_row` is the most tokens that a row can come to.
    """

    def __init__(
        self, store: TokenStore, index: RowIndex, rows: Iterator[int], *, num_rows: int, unit: str, most_per_row: int
    ) -> None:
        self._store = store
        self._index = index
        self._rows = rows
        # Rows that were not drawn yet.
        self.num_left = num_rows
        self.most_per_row = most_per_row
        self._next: list[int] = []
        self._bytes_read = 0
        self.unit = unit
        # Of each example drawn: its index in the shard, its tokens, its target tokens, whether it was cut.
        self.examples, self.tokens, self.targets, self.cuts = array("I"), array("I"), array("I"), bytearray()
        self.dropped: dict[str, int] = {}
        # In the mix's unit.
        self.amount = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def exhausted(self) -> bool:
        """Whether every row has been drawn."""
        return not self.num_left

    @property
    def num_available(self) -> int:
        """Rows that are examples, or not known to be none."""
        return len(self.examples) + self.num_left

    def draw_examples(self, count: int) -> None:
        """Until there are `count` examples, or no more rows."""
        while len(self.examples) < count and self.num_left:
            self._draw(min(count - len(self.examples), CHUNK_ROWS))

    def draw_amount(self, wanted: Fraction) -> None:
        """Until the amount is as near to `wanted` as can be told without reading one more row."""
        while self.draw_towards(wanted, most_rows=CHUNK_ROWS):
            pass

    def draw_towards(self, wanted: Fraction | None, *, most_rows: int) -> bool:
        """Reads up to so many rows; False when none is left or needed. With `wanted` None all are needed."""
        if not self.num_left or (wanted is not None and self.amount >= wanted):
            return False
        if wanted is not None:
            # So many rows cannot exceed it, whatever they hold.
            safe = int((wanted - self.amount) / self.most_per_row)
            if safe < 1 and not self._bring_last(wanted - self.amount):
                return False
            most_rows = min(max(safe, 1), most_rows)
        self._draw(most_rows)
        return True

    def amounts(self) -> "array[int]":
        """What each example counts for in the mix's unit."""
        if self.unit == "examples":
            return array("I", [1]) * len(self.examples)
        return self.tokens if self.unit == "tokens" else self.targets

    def count_nearest(self, wanted: Fraction) -> int:
        """How many of the first examples come nearest to this amount."""
        total = 0
        for position, amount in enumerate(self.amounts()):
            if total + amount - wanted > wanted - total:
                return position
            total += amount
        return len(self.examples)

    def close(self) -> TokenShard:
        """The shard of what was drawn."""
        return self._store.close()

    def _bring_last(self, missing: Fraction) -> bool:
        """Whether one more row is to be read; where it may be the last, the likeliest of the next ones comes first.

        A row is judged by its bytes, from the tokens that bytes came to so far: it is not read for this.
        """
        if not self.amount or missing >= 2 * Fraction(self.amount, len(self.examples)):
            return True
        while len(self._next) < min(_LAST_ROWS, self.num_left):
            self._next.append(next(self._rows))
        per_byte = Fraction(self.amount, self._bytes_read)
        misses = [abs(self._index.row_bytes(row) * per_byte - missing) for row in self._next]
        nearest = misses.index(min(misses))
        if misses[nearest] > missing:
            return False
        self._next.insert(0, self._next.pop(nearest))
        return True

    def _draw(self, count: int) -> None:
        rows = []
        for _ in range(min(count, self.num_left)):
            rows.append(self._next.pop(0) if self._next else next(self._rows))
        self.num_left -= len(rows)
        for row, tokens in zip(rows, self._store.read(rows), strict=True):
            self._bytes_read += self._index.row_bytes(row)
            if tokens.example_index is None:
                self.dropped[tokens.dropped_reason] = self.dropped.get(tokens.dropped_reason, 0) + 1
                continue
            self.examples.append(tokens.example_index)
            self.tokens.append(tokens.num_tokens)
            self.targets.append(tokens.num_target_tokens)
            self.cuts.append(int(tokens.truncated))
            self.amount += {"examples": 1, "tokens": tokens.num_tokens, "target_tokens": tokens.num_target_tokens}[
                self.unit
            ]


def skip_rows(rows: Iterator[int], left_out: Sequence[int]) -> Iterator[int]:
    """The same order without rows whose entry in `left_out` is not 0."""
    return (row for row in rows if not left_out[row])
