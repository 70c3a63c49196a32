"""`adamw-8bit`: bitsandbytes' AdamW with moments of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from bitsandbytes.optim import AdamW8bit

from gpu_service.engine.builders.optimizers.parameter_groups import group
from tunesmith.common.v1 import training_spec_pb2


def build(parameters: Iterable[torch.nn.Parameter], settings: training_spec_pb2.Optimizer) -> torch.optim.Optimizer:
    """The optimizer over `parameters`; the schedule sets the learning rate before each step."""
    optimizer: torch.optim.Optimizer = AdamW8bit(
        group(parameters, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    return optimizer
