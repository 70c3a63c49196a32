"""`adamw`: torch's own AdamW. Weight decay applies to matrices only, not to norms and biases."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tunesmith.common.v1 import training_spec_pb2


def build(parameters: Iterable[torch.nn.Parameter], settings: training_spec_pb2.Optimizer) -> torch.optim.Optimizer:
    """The optimizer over `parameters`, in the order given; the schedule sets the learning rate before each step."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
