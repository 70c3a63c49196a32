"""Trained linear layers that read the same rows: one product forward, and backward one for the rows and one for the
weights, whose gradient goes where `weight_gradients` says. Has no adapter, and so no margins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.full_weights import Region
from gpu_service.engine.fast_path.weight_gradients import Gradients


@dataclass(frozen=True, kw_only=True)
class FullProjection:
    """`weight` is [N, K] and `bias` [N] or None, in the compute type; the regions are theirs in flat buffers."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_region: Region
    bias_region: Region | None
    gradients: Gradients
    # The modules of kernels: of the path, and of full training.
    operations: Any
    kernels: Any

    room = 0

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def input_buffer(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """An empty [T, K]."""
        return like.new_empty((rows, self.weight.shape[1]))

    def output_buffer(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """An empty [T, N]."""
        return like.new_empty((rows, self.weight.shape[0]))

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An input buffer as its rows and a margin without columns."""
        return x, x[:, :0]

    def forward(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`out` [T, N] becomes the layers' outputs of `x` [T, K]."""
        self.multiply(x, out, adapted=adapted)

    def fill_margin(self, x: torch.Tensor) -> None:
        """Nothing: there is none."""

    def forward_rows(self, rows: torch.Tensor, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`forward` of `rows` [T, K], which become `x`."""
        x.copy_(rows)
        self.multiply(x, out, adapted=adapted)

    def place_gated(self, gate_up: torch.Tensor, x: torch.Tensor, *, adapted: bool) -> None:
        """silu(gate) * up of `gate_up` [T, 2 * K] become `x`."""
        del adapted
        self.operations.gate(gate_up, x)

    def forward_gated(self, gate_up: torch.Tensor, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`place_gated`, and `forward` of `x`."""
        self.place_gated(gate_up, x, adapted=adapted)
        self.multiply(x, out, adapted=adapted)

    def multiply(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """As `forward`."""
        del adapted
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def backward(
        self,
        gradient: torch.Tensor,
        rows: torch.Tensor,
        ranks: torch.Tensor,
        out: torch.Tensor | None,
        gradients: torch.Tensor,
        *,
        of_gated: torch.Tensor | None = None,
    ) -> None:
        """`out` [T, K] becomes the gradient of the rows, `gradient` [T, N] being that of the outputs.

        With `of_gated` [T, N / 2] the outputs are gates and ups, `gradient` holds them, and becomes their gradient.
        """
        # Of adapters.
        del ranks, gradients
        if of_gated is not None:
            self.operations.gate_backward_(of_gated, gradient)
        if out is not None:
            # First: the weights are complete, and may change, with their gradient.
            torch.mm(gradient, self.weight, out=out)
        place = self.gradients.place(self.weight_region)
        self.kernels.weigh(gradient, rows, place.tensor, adds=place.adds)
        self.gradients.complete(self.weight_region)
        if self.bias_region is not None:
            place = self.gradients.place(self.bias_region)
            self.kernels.sum_rows(gradient, place.tensor, adds=place.adds)
            self.gradients.complete(self.bias_region)
