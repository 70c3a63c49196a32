"""Final norm, output head and likelihood of the tokens that carry loss, with the gradient made on the way.

The head's logits exist for a few rows at a time and become their own gradient in place; no matrix of tokens by
vocabulary is ever stored. Rows without a target are dropped before anything is computed for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.domain.recomputation import HEAD_ROWS


@dataclass(frozen=True, kw_only=True)
class KeptHead:
    """What the backward pass needs: gradients [K, H] of each target's own nats, by the normed row."""

    rows: torch.Tensor
    scale: torch.Tensor
    of_normed: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Head:
    """`weight` is [V, H] in the compute type, frozen, as the norm is."""

    operations: Any
    norm: torch.Tensor
    epsilon: float
    weight: torch.Tensor
    # Rows of logits that exist at a time.
    chunk_rows: int = HEAD_ROWS

    def forward(
        self, x: torch.Tensor, add: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor, *, keeps: bool
    ) -> tuple[torch.Tensor, KeptHead | None]:
        """Nats of each target, float32 [K]; `x + add` [T, H] is the last block's output, `targets` rows of it [K]."""
        picked = x.index_select(0, targets)
        normed = torch.empty_like(picked)
        rows, scale = self.operations.add_norm(picked, add.index_select(0, targets), self.norm, self.epsilon, normed)
        nats = torch.empty(len(targets), device=x.device, dtype=torch.float32)
        of_normed = torch.empty_like(normed) if keeps else None
        for first in range(0, len(targets), self.chunk_rows):
            chunk = slice(first, first + self.chunk_rows)
            logits = torch.mm(normed[chunk], self.weight.t())
            self.operations.cross_entropy_(logits, labels[chunk], nats[chunk])
            if of_normed is not None:
                torch.mm(logits, self.weight, out=of_normed[chunk])
            # Before the next chunk's are made: they take half a gigabyte.
            del logits
        kept = None if of_normed is None else KeptHead(rows=rows, scale=scale, of_normed=of_normed)
        return nats, kept

    def backward(self, upstream: torch.Tensor, kept: KeptHead, targets: torch.Tensor, residual: torch.Tensor) -> None:
        """`residual` [T, H] becomes the gradient of the last block's output. `upstream` [K] is that of the nats."""
        # In float32, and rounded once: rounding a factor that all rows share would scale the whole gradient.
        of_normed = torch.mul(kept.of_normed, upstream.float()[:, None], out=kept.of_normed)
        of_rows = torch.empty_like(of_normed)
        self.operations.norm_backward_(of_normed, kept.rows, self.norm, kept.scale, of_rows, adds=False)
        residual.zero_()
        residual.index_copy_(0, targets, of_rows)
