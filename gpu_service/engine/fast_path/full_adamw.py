"""AdamW over the flat weights in one launch for matrices and one for the rest, with clipping in the same pass.

What it saves is the state of the plain path: one entry a parameter, so a checkpoint of one path says the same as the
other's, and either goes on from it.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_service.engine.fast_path.full_operations import full_operations_for
from gpu_service.engine.fast_path.full_optimizer import FullOptimizer
from gpu_service.engine.fast_path.full_weights import FlatWeights
from gpu_service.engine.fast_path.weight_gradients import GatheredGradients
from tunesmith.common.v1 import training_spec_pb2

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FullAdamW(FullOptimizer):
    """Reads gradients where they were gathered."""

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
        super().__init__(weights.held, weights.num_matrix_elements, settings)
        self._kernels = kernels or full_operations_for(weights.held.device)
        self._moments = {name: torch.zeros_like(weights.held) for name in _MOMENTS}

    def clip(self, limit: float) -> torch.Tensor:
        """The gradient's norm, float32 on the device; the next step takes no more than `limit` of it."""
        norm = self._gradients.norm()
        self._clip_by(norm, limit)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with the gradients that were gathered; without any, nothing. There is no closure to call."""
        del closure
        if self._gradients.is_empty:
            return
        first, second = (self._moments[name] for name in _MOMENTS)
        working, held = self._weights.working, self._weights.held
        for piece, (numbers, settings) in zip(self._pieces, self._begin_step(), strict=True):
            self._kernels.step_adamw(
                held[piece],
                None if working is held else working[piece],
                self._gradients.flat[piece],
                first[piece],
                second[piece],
                numbers,
                settings,
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was gathered."""
        del set_to_none
        self._gradients.drop()
        self._forget_clipping()

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
        self._load_groups(state_dict["param_groups"])
        self._has_state = bool(entries)
        if entries:
            self._steps = entries[0]["step"].to(self._steps)
        for name, buffer in self._moments.items():
            for number, view in enumerate(self._weights.views(buffer)):
                if entries:
                    view.copy_(entries[number][name])
                else:
                    view.zero_()
