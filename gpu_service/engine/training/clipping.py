"""The norm of a step's gradient, and its clipping: torch's way, or that of an optimizer that gathers gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class ClipsItself(Protocol):
    """An optimizer that knows its gradient's norm, and clips as it steps."""

    def clip(self, limit: float) -> torch.Tensor:
        """The norm before clipping, float32 on the device; the next step is clipped to `limit`, which may be inf."""
        ...


def clip_gradient(
    accelerator: Any, optimizer: Any, parameters: Sequence[torch.nn.Parameter], max_norm: float
) -> torch.Tensor:
    """The gradient's norm before it is clipped to `max_norm`; 0 switches clipping off, and the norm is measured still.

    `accelerator` and `optimizer` are the trainer's.
    """
    limit = max_norm if max_norm > 0 else math.inf
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, ClipsItself):
        return inner.clip(limit)
    norm: torch.Tensor = accelerator.clip_grad_norm_(parameters, limit)
    return norm
