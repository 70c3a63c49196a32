"""What the percentages and weights of traits must obey. Counting examples from shares is the planner's work."""

from __future__ import annotations

import math
from collections.abc import Sequence

from control_service.domain.spec import Trait

PERCENTAGE_TOLERANCE = 0.01
DEFAULT_WEIGHT = 1.0
MAXIMUM_HELD_OUT_FRACTION = 0.5


def effective_weight(trait: Trait) -> float:
    """The trait's weight; an unset one counts as 1."""
    return DEFAULT_WEIGHT if trait.weight is None else trait.weight


def problem_with_held_out_fraction(trait: Trait) -> str:
    """Says so when the part of a trait's datasets that is held out is no number from 0 to 0.5; empty when it is one."""
    fraction = trait.held_out_fraction
    if fraction is None or (math.isfinite(fraction) and 0 <= fraction <= MAXIMUM_HELD_OUT_FRACTION):
        return ""
    return f"must be a finite number from 0 to {MAXIMUM_HELD_OUT_FRACTION:g}"


def problem_with_percentages(trait: Trait) -> str:
    """Says so when the percentages of a trait do not add up to 100 within 0.01; empty when they do."""
    total = math.fsum(part.percentage for part in trait.datasets)
    # A hair above the tolerance, since 99.99 is not a binary fraction.
    if abs(total - 100.0) <= PERCENTAGE_TOLERANCE + 1e-9:
        return ""
    return f"the percentages add up to {total:g}, not to 100"


def all_weights_are_zero(traits: Sequence[Trait]) -> bool:
    """True when no trait would get any share."""
    return bool(traits) and all(effective_weight(trait) == 0 for trait in traits)
