"""Final norm and output head where both are trained: the likelihood of targets, and the gradient of either.

Logits exist for a few rows at a time, in the forward pass and once more in the backward pass, which knows what each
target counts; no matrix of tokens by vocabulary is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.full_weights import Region
from gpu_service.engine.fast_path.head import CHUNK_ROWS
from gpu_service.engine.fast_path.weight_gradients import Gradients


@dataclass(frozen=True, kw_only=True)
class KeptFullHead:
    """What the backward pass needs: rows before and after the norm [K, H], 1/rms of the former, and the labels."""

    rows: torch.Tensor
    scale: torch.Tensor
    normed: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FullHead:
    """`weight` is [V, H] in the compute type; it may be the embedding's, whose gradient is then completed there."""

    operations: Any
    kernels: Any
    gradients: Gradients
    norm: torch.Tensor
    epsilon: float
    weight: torch.Tensor
    norm_region: Region
    weight_region: Region
    is_tied: bool

    def forward(
        self, x: torch.Tensor, add: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor, *, keeps: bool
    ) -> tuple[torch.Tensor, KeptFullHead | None]:
        """Nats of each target, float32 [K]; `x + add` [T, H] is the last block's output, `targets` rows of it [K]."""
        picked = x.index_select(0, targets)
        normed = torch.empty_like(picked)
        rows, scale = self.operations.add_norm(picked, add.index_select(0, targets), self.norm, self.epsilon, normed)
        nats = torch.empty(len(targets), device=x.device, dtype=torch.float32)
        for first in range(0, len(targets), CHUNK_ROWS):
            chunk = slice(first, first + CHUNK_ROWS)
            self._turn_to_gradient(normed[chunk], labels[chunk], nats[chunk])
        return nats, KeptFullHead(rows=rows, scale=scale, normed=normed, labels=labels) if keeps else None

    def _turn_to_gradient(self, normed: torch.Tensor, labels: torch.Tensor, nats: torch.Tensor) -> torch.Tensor:
        """The gradient of each row's own nats by its logits [rows, V]; `nats` are written."""
        logits = torch.mm(normed, self.weight.t())
        self.operations.cross_entropy_(logits, labels, nats)
        return logits

    def backward(
        self, upstream: torch.Tensor, kept: KeptFullHead, targets: torch.Tensor, residual: torch.Tensor
    ) -> None:
        """`residual` [T, H] becomes the gradient of the last block's output. `upstream` [K] is that of the nats."""
        counts = upstream.float()[:, None]
        of_normed = torch.empty_like(kept.normed)
        unused = torch.empty(len(targets), device=residual.device, dtype=torch.float32)
        place = self.gradients.place(self.weight_region)
        if not len(targets) and not place.adds:
            place.tensor.zero_()
        for first in range(0, len(targets), CHUNK_ROWS):
            chunk = slice(first, first + CHUNK_ROWS)
            of_logits = self._turn_to_gradient(kept.normed[chunk], kept.labels[chunk], unused[chunk])
            torch.mm(of_logits, self.weight, out=of_normed[chunk])
            # Rows rather than logits: there are fewer of them.
            weighed = (kept.normed[chunk] * counts[chunk]).to(of_logits.dtype)
            self.kernels.weigh(of_logits, weighed, place.tensor, adds=place.adds or first > 0)
            # Before the next chunk's are made: they take half a gigabyte.
            del of_logits
        if not self.is_tied:
            self.gradients.complete(self.weight_region)
        # In float32, and rounded once: rounding a factor that all rows share would scale the whole gradient.
        torch.mul(of_normed, counts, out=of_normed)
        of_rows = torch.empty_like(of_normed)
        self.operations.norm_backward_(of_normed, kept.rows, self.norm, kept.scale, of_rows, adds=False)
        place = self.gradients.place(self.norm_region)
        self.kernels.weigh_norm(of_normed, kept.rows, kept.scale, place.tensor, heads=1, adds=place.adds)
        self.gradients.complete(self.norm_region)
        residual.zero_()
        residual.index_copy_(0, targets, of_rows)
