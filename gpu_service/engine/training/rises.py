"""Which traits' held-out loss keeps rising, read from the history of evaluations alone. No torch, and no state.

The history is in every checkpoint, so that a resumed run counts on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rise:
    """A trait whose loss rose from `first` to `last` in `num_rises` evaluations, one after another."""

    trait_type: str
    num_rises: int
    first: float
    last: float


def find_rises(evaluations: Sequence[Mapping[str, Any]], after: int) -> list[Rise]:
    """Traits to warn of after the newest evaluation; none when `after` is 0.

    A trait is told of when its loss has risen `after` times in a row, and again after as many more. A loss that is not
    a finite number ends a row.
    """
    if not after or not evaluations:
        return []
    found = []
    for trait in _losses(evaluations[-1]):
        history = [_losses(evaluation).get(trait) for evaluation in reversed(evaluations)]
        row = _rising_end(history)
        if len(row) > 1 and (len(row) - 1) % after == 0:
            found.append(Rise(trait_type=trait, num_rises=len(row) - 1, first=row[-1], last=row[0]))
    return found


def _losses(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    return {row["trait_type"]: row["loss"] for row in evaluation["losses"] if row["dataset_id"] == 0}


def _rising_end(newest_first: Sequence[float | None]) -> list[float]:
    row: list[float] = []
    for loss in newest_first:
        if loss is None or (row and loss >= row[-1]):
            break
        row.append(loss)
    return row
