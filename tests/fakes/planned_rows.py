"""Examples in memory that stand in for planned data, for tests of what happens to a batch."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import cast

from gpu_service.domain.planned_data import Example, ExampleReference, PlannedData, Source


class PlannedRows:
    """`rows` are examples; row i belongs to source `i % len(traits)`, whose dataset id is one more than its index."""

    def __init__(self, rows: Sequence[Example], traits: Sequence[str] = ("only",)) -> None:
        self._rows = rows
        self.sources = tuple(
            Source(trait_type=trait, dataset_id=index + 1, held_out=True, num_examples=len(rows))
            for index, trait in enumerate(traits)
        )
        self.references = [ExampleReference(index % len(traits), index) for index in range(len(rows))]

    def example(self, reference: ExampleReference) -> Example:
        return self._rows[reference.example_index]

    def held_out_examples(self) -> list[ExampleReference]:
        return self.references

    def as_data(self) -> PlannedData:
        """This, for whoever asks for planned data and reads no more of it than there is here."""
        return cast(PlannedData, self)


def make_example(tokens: Sequence[int], mask: Sequence[int] | None = None) -> Example:
    """An example of these tokens; every token but the first carries loss unless `mask` says otherwise."""
    mask = mask if mask is not None else [0, *[1] * (len(tokens) - 1)]
    return Example(tokens=memoryview(array("i", tokens)), mask=memoryview(bytes(mask)))


def make_examples(lengths: Sequence[int], *, vocabulary_size: int, seed: int) -> list[Example]:
    """Random tokens; about a third of each example is prompt and carries no loss."""
    draw = random.Random(seed)
    return [
        make_example(
            [draw.randrange(vocabulary_size) for _ in range(length)],
            [int(place > length // 3) for place in range(length)],
        )
        for length in lengths
    ]


def make_pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Example:
    """A preference pair of two answers to one prompt; the answers carry loss."""
    tokens = [*prompt, *chosen, *prompt, *rejected]
    mask = [*[0] * len(prompt), *[1] * len(chosen), *[0] * len(prompt), *[1] * len(rejected)]
    return Example(
        tokens=memoryview(array("i", tokens)),
        mask=memoryview(bytes(mask)),
        rejected_start=len(prompt) + len(chosen),
    )
