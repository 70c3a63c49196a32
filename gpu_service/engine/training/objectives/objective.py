"""What the loop and the evaluation ask of an objective. Declares; computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gpu_service.engine.training.batches import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a forward pass came to. Nothing in it was read back from the device yet.

    `total` is the sum of the examples' losses, a scalar with gradient. `values` is float64 [examples, columns] without
    gradient; column 0 is each example's loss, further ones are the objective's own.
    """

    total: torch.Tensor
    values: torch.Tensor


class Objective(Protocol):
    """A loss that is a sum over examples divided by a sum of their weights, however they are divided into passes."""

    def weights(self, batch: MicroBatch) -> tuple[int, ...]:
        """What each example counts in the mean."""
        ...

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        """One forward pass over `batch`, which is on the model's device."""
        ...
