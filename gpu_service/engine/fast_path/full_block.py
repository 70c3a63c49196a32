"""A decoder block whose norms are trained too: `block`'s passes, with the gradients of the norms' weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.block import Block
from gpu_service.engine.fast_path.full_weights import Region
from gpu_service.engine.fast_path.weight_gradients import Gradients


@dataclass(frozen=True, kw_only=True)
class FullBlock(Block):
    """`norm_regions` are the places of first and second norm, `head_norm_regions` of those of queries and keys."""

    gradients: Gradients
    # The module of kernels of full training.
    kernels: Any
    norm_regions: tuple[Region, Region]
    head_norm_regions: tuple[Region, Region] | None

    def back_through_norm(
        self, number: int, of_normed: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, stream: torch.Tensor
    ) -> None:
        super().back_through_norm(number, of_normed, x, scale, stream)
        self._weigh(self.norm_regions[number], of_normed, x, scale, heads=1)

    def _back_through_head_norm(
        self, number: int, gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, *, heads: int
    ) -> None:
        assert self.head_norm_regions is not None
        before = gradient.clone()
        super()._back_through_head_norm(number, gradient, x, scale, heads=heads)
        self._weigh(self.head_norm_regions[number], before, x, scale, heads=heads)

    def _weigh(
        self, region: Region, gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, *, heads: int
    ) -> None:
        """Last: with its gradient complete, the weight may change."""
        place = self.gradients.place(region)
        self.kernels.weigh_norm(gradient, x, scale, place.tensor, heads=heads, adds=place.adds)
        self.gradients.complete(region)
