"""Held-out losses that rise, from the history alone."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_service.engine.training.rises import Rise, find_rises


def _history(**losses: list[float | None]) -> list[dict[str, Any]]:
    """One evaluation a place of the lists; datasets' own rows are there too, and mean nothing here."""
    return [
        {
            "losses": [
                row
                for trait, loss in zip(losses, column, strict=True)
                for row in (
                    {"trait_type": trait, "dataset_id": 0, "loss": loss},
                    {"trait_type": trait, "dataset_id": 7, "loss": 0.0},
                )
            ]
        }
        for column in zip(*losses.values(), strict=True)
    ]


def test_only_the_trait_that_rises_is_told() -> None:
    history = _history(coding=[3.0, 2.0, 2.5, 2.75, 3.5], reasoning=[3.0, 2.0, 1.5, 1.25, 1.0])
    assert find_rises(history, 3) == [Rise(trait_type="coding", num_rises=3, first=2.0, last=3.5)]


@pytest.mark.parametrize(
    ("losses", "after", "expected"),
    [
        ([], 1, []),
        ([1.0], 1, []),
        ([1.0, 2.0], 1, [1]),
        ([1.0, 2.0, 3.0], 1, [2]),
        ([1.0, 2.0, 3.0], 3, []),
        ([1.0, 2.0, 3.0, 4.0], 3, [3]),
        # Told again only after as many more.
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3, []),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 3, [6]),
        # What stays the same, falls or is not a number ends a row.
        ([1.0, 2.0, 2.0, 3.0], 2, []),
        ([1.0, 2.0, 1.5, 2.0], 2, []),
        ([1.0, 2.0, None, 3.0, 4.0], 2, []),
        ([None, 2.0, 3.0, 4.0], 2, [2]),
        ([2.0, 3.0, None], 1, []),
        ([1.0, 2.0, 3.0], 0, []),
    ],
)
def test_rows_of_rises(losses: list[float | None], after: int, expected: list[int]) -> None:
    history = _history(coding=losses) if losses else []
    assert [rise.num_rises for rise in find_rises(history, after)] == expected


def test_history_after_a_resume_counts_on() -> None:
    """The history is a checkpoint's; what was evaluated before it and after it is one row."""
    before = _history(coding=[1.0, 2.0])
    assert find_rises(before, 2) == []
    after = [*before, *_history(coding=[3.0])]
    assert [rise.num_rises for rise in find_rises(after, 2)] == [2]
