"""What the optimizers of every weight share: matrices with weight decay and the rest without, clipping, steps left out.

How gradients come to the weights, and what is kept of them, is each optimizer's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gpu_service.engine.fast_path.full_reference import AdamSettings, StepNumbers
from tunesmith.common.v1 import training_spec_pb2

# As torch.nn.utils.clip_grad_norm_ has it.
_CLIP_EPSILON = 1e-6


class FullOptimizer(torch.optim.AdamW):
    """Group 0 is of matrices, group 1 of the rest. Its parameters have no gradients."""

    def __init__(self, flat: torch.Tensor, num_matrix_elements: int, settings: training_spec_pb2.Optimizer) -> None:
        """`flat` holds the weights, matrices first."""
        self._pieces = (slice(0, num_matrix_elements), slice(num_matrix_elements, flat.numel()))
        groups = [
            {"params": [torch.nn.Parameter(flat[piece])], "weight_decay": weight_decay}
            for piece, weight_decay in zip(self._pieces, (settings.weight_decay, 0.0), strict=True)
        ]
        super().__init__(
            groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon
        )
        # Steps that were made, counted on the device: the host does not know which were left out.
        self._steps = torch.zeros((), device=flat.device)
        self._has_state = False
        self._factor = torch.ones((), device=flat.device)
        self._flag: torch.Tensor | None = None

    def leave_out(self, flag: torch.Tensor) -> None:
        """Steps do nothing while `flag`, a float32 scalar on the device, is 1 there; asked for again before each."""
        self._flag = flag

    def _clip_by(self, norm: torch.Tensor, limit: float) -> None:
        """The next step takes no more than `limit` of a gradient of `norm`."""
        factor = limit / (norm + _CLIP_EPSILON) if math.isfinite(limit) else torch.ones_like(norm)
        self._factor = factor.clamp(max=1.0)

    def _forget_clipping(self) -> None:
        self._factor = torch.ones_like(self._factor)

    def _begin_step(self) -> list[tuple[StepNumbers, AdamSettings]]:
        """Count the step, unless it is left out; what each group's kernel is told of it."""
        goes = torch.ones_like(self._steps) if self._flag is None else 1 - self._flag
        self._steps += goes
        self._has_state = True
        return [(self._numbers(group, goes), _settings(group)) for group in self.param_groups]

    def _numbers(self, group: dict[str, Any], goes: torch.Tensor) -> StepNumbers:
        beta1, beta2 = group["betas"]
        # In float64: of 1 - beta2 little is left in float32.
        steps = self._steps.double()
        size = group["lr"] / (1 - beta1**steps)
        inverse_root = (1 - beta2**steps).rsqrt()
        numbers = torch.stack([size, inverse_root, self._factor.double(), goes.double()]).float()
        return StepNumbers(learning_rate=group["lr"], numbers=numbers)

    def _load_groups(self, groups: list[dict[str, Any]]) -> None:
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


def _settings(group: dict[str, Any]) -> AdamSettings:
    beta1, beta2 = group["betas"]
    return AdamSettings(beta1=beta1, beta2=beta2, epsilon=group["eps"], weight_decay=group["weight_decay"])
