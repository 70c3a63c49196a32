"""Rows of one dataset drawn in a seeded order, until there are enough examples or enough tokens of them.

Draws no row that it does not need: where tokens are counted, a row is read only if it must fit or is likelier to bring
the amount nearer to what is wanted than not. Decides nothing about how much is wanted.
"""

from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction

from gpu_service.domain.planned_data import TokenShard
from gpu_service.planner.row_index import RowIndex
from gpu_service.planner.token_store import TokenStore

_CHUNK_ROWS = 4096


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
        self._most_per_row = most_per_row
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
            self._draw(min(count - len(self.examples), _CHUNK_ROWS))

    def draw_amount(self, wanted: Fraction | None) -> None:
        """Until the amount is as near to `wanted` as can be told without reading one more row; None: all rows."""
        while self.num_left and (wanted is None or self.amount < wanted):
            # So many rows cannot exceed it, whatever they hold.
            safe = _CHUNK_ROWS if wanted is None else int((wanted - self.amount) / self._most_per_row)
            if safe < 1 and wanted is not None and not self._brings_nearer(wanted):
                return
            self._draw(min(max(safe, 1), _CHUNK_ROWS))

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

    def _brings_nearer(self, wanted: Fraction) -> bool:
        if not self.amount:
            return True
        # Tokens by bytes, as they were so far: the row itself is not read for this.
        likely = Fraction(self._index.row_bytes(self._peek()) * self.amount, self._bytes_read)
        return likely <= 2 * (wanted - self.amount)

    def _peek(self) -> int:
        if not self._next:
            self._next.append(next(self._rows))
        return self._next[0]

    def _draw(self, count: int) -> None:
        rows = []
        for _ in range(min(count, self.num_left)):
            rows.append(self._next.pop() if self._next else next(self._rows))
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
