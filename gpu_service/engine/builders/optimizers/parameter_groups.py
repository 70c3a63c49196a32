"""Which parameters weight decay applies to: matrices, not norms and biases. No optimizer itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def group(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups as torch's optimizers take them, in the order given; none is empty."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [one for one in groups if one["params"]]
