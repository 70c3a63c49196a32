"""AdamW over the flat weights in one launch for matrices and one for the rest, with clipping in the same pass.

What it saves is the state of the plain path: one entry a parameter, so a checkpoint of one path says the same as the
other's, and either goes on from it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gpu_service.engine.fast_path.full_operations import full_operations_for
from gpu_service.engine.fast_path.full_reference import AdamSettings, StepNumbers
from gpu_service.engine.fast_path.full_weights import FlatWeights
from gpu_service.engine.fast_path.weight_gradients import GatheredGradients
from tunesmith.common.v1 import training_spec_pb2

_MOMENTS = ("exp_avg", "exp_avg_sq")
# As torch.nn.utils.clip_grad_norm_ has it.
_CLIP_EPSILON = 1e-6


class FullAdamW(torch.optim.AdamW):
    """Reads gradients where they were gathered; its parameters have none. Weight decay is of matrices alone."""

    def __init__(
        self,
        weights: FlatWeights,
        gradients: GatheredGradients,
        settings: training_spec_pb2.Optimizer,
        *,
        kernels: Any = None,
    ) -> None:
        """`kernels` None are the device's own."""
        self._weights, self._gradients = weights, gradients
        boundary = weights.num_matrix_elements
        self._pieces = (slice(0, boundary), slice(boundary, weights.held.numel()))
        groups = [
            {"params": [torch.nn.Parameter(weights.held[piece])], "weight_decay": weight_decay}
            for piece, weight_decay in zip(self._pieces, (settings.weight_decay, 0.0), strict=True)
        ]
        super().__init__(
            groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon
        )
        device = weights.held.device
        self._kernels = kernels or full_operations_for(device)
        self._moments = {name: torch.zeros_like(weights.held) for name in _MOMENTS}
        # Steps that were made, counted on the device: the host does not know which were left out.
        self._steps = torch.zeros((), device=device)
        self._has_state = False
        self._factor = torch.ones((), device=device)
        self._flag: torch.Tensor | None = None

    def leave_out(self, flag: torch.Tensor) -> None:
        """Steps do nothing while `flag`, a float32 scalar on the device, is 1 there; asked for again before each."""
        self._flag = flag

    def clip(self, limit: float) -> torch.Tensor:
        """The gradient's norm, float32 on the device; the next step takes no more than `limit` of it."""
        norm = self._gradients.norm()
        factor = limit / (norm + _CLIP_EPSILON) if math.isfinite(limit) else torch.ones_like(norm)
        self._factor = factor.clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with the gradients that were gathered; without any, nothing. There is no closure to call."""
        del closure
        if self._gradients.is_empty:
            return
        goes = torch.ones_like(self._steps) if self._flag is None else 1 - self._flag
        self._steps += goes
        self._has_state = True
        for group, piece in zip(self.param_groups, self._pieces, strict=True):
            beta1, beta2 = group["betas"]
            numbers = self._numbers(group["lr"], beta1, beta2, goes)
            working, held = self._weights.working, self._weights.held
            self._kernels.step_adamw(
                held[piece],
                None if working is held else working[piece],
                self._gradients.flat[piece],
                self._moments[_MOMENTS[0]][piece],
                self._moments[_MOMENTS[1]][piece],
                StepNumbers(learning_rate=group["lr"], numbers=numbers),
                AdamSettings(beta1=beta1, beta2=beta2, epsilon=group["eps"], weight_decay=group["weight_decay"]),
            )

    def _numbers(self, learning_rate: float, beta1: float, beta2: float, goes: torch.Tensor) -> torch.Tensor:
        # In float64: of 1 - beta2 little is left in float32.
        steps = self._steps.double()
        size = learning_rate / (1 - beta1**steps)
        inverse_root = (1 - beta2**steps).rsqrt()
        return torch.stack([size, inverse_root, self._factor.double(), goes.double()]).float()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was gathered."""
        del set_to_none
        self._gradients.drop()
        self._factor = torch.ones_like(self._factor)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW over the model's parameters would give it; moments are views of the flat ones."""
        groups, first = super().state_dict()["param_groups"], 0
        for group, count in zip(groups, self._weights.counts, strict=True):
            group["params"] = list(range(first, first + count))
            first += count
        state: dict[int, dict[str, Any]] = {}
        if self._has_state:
            views = zip(*(self._weights.views(self._moments[name]) for name in _MOMENTS), strict=True)
            state = {
                number: {"step": self._steps, **dict(zip(_MOMENTS, pair, strict=True))}
                for number, pair in enumerate(views)
            }
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what either path saved. Raises ValueError when it is of other parameters."""
        entries, counts = state_dict["state"], self._weights.counts
        if [len(group["params"]) for group in state_dict["param_groups"]] != list(counts):
            raise ValueError("the optimizer's state is of other parameters")
        if len(entries) not in (0, sum(counts)):
            raise ValueError(f"the optimizer's state is of {len(entries)} parameters")
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self._has_state = bool(entries)
        if entries:
            self._steps = entries[0]["step"].to(self._steps)
        for name, buffer in self._moments.items():
            for number, view in enumerate(self._weights.views(buffer)):
                if entries:
                    view.copy_(entries[number][name])
                else:
                    view.zero_()
