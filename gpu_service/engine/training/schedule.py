"""Learning rate as a pure function of the step, so that resuming needs nothing but the step. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


def _constant(progress: float) -> float:
    del progress
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


# Factor after warm-up by progress from 0 (warm-up is over) to 1 (behind the last step).
SHAPES: Mapping[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`name` is one of SHAPES; `warmup_steps` of `num_steps` rise linearly from 0."""

    name: str
    peak: float
    warmup_steps: int
    num_steps: int

    def learning_rate(self, step: int) -> float:
        """The rate of `step`, counted from 0. Steps of warm-up get (step + 1) / (warmup_steps + 1) of the peak."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        rest = max(self.num_steps - self.warmup_steps, 1)
        return self.peak * SHAPES[self.name](min((step - self.warmup_steps) / rest, 1.0))
