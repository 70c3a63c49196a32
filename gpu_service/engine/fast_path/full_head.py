"""Final norm and output head where both are trained: the likelihood of targets, and the gradient of either.

Logits exist for a few rows at a time; no matrix of tokens by vocabulary is ever stored. Where all targets count alike,
the gradients are made with them in the forward pass, up to that factor. Where they do not, or there is no room for the
weight's, logits are made once more in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.domain.recomputation import HEAD_ROWS
from gpu_service.engine.fast_path.full_weights import Region
from gpu_service.engine.fast_path.weight_gradients import EarlyPlace, Gradients


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Gradients of each target's nats: float32 [K], and the one that all share [1], or None if they may differ."""

    by_target: torch.Tensor
    shared: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Gradients by each target's own nats: of the normed rows [K, H], and the weight's."""

    of_normed: torch.Tensor
    of_weight: EarlyPlace


@dataclass(frozen=True, kw_only=True)
class KeptFullHead:
    """What the backward pass needs: rows before and after the norm [K, H], 1/rms of the former, and the labels."""

    rows: torch.Tensor
    scale: torch.Tensor
    normed: torch.Tensor
    labels: torch.Tensor
    made: _Made | None


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
        early = self.gradients.place_early(self.weight_region) if keeps and len(targets) else None
        made = None if early is None else _Made(of_normed=torch.empty_like(normed), of_weight=early)
        for first in range(0, len(targets), HEAD_ROWS):
            chunk = slice(first, first + HEAD_ROWS)
            of_logits = self._turn_to_gradient(normed[chunk], labels[chunk], nats[chunk])
            if made is not None:
                torch.mm(of_logits, self.weight, out=made.of_normed[chunk])
                self.kernels.weigh(of_logits, normed[chunk], made.of_weight.tensor, adds=first > 0)
            # Before the next chunk's are made: they take half a gigabyte.
            del of_logits
        kept = KeptFullHead(rows=rows, scale=scale, normed=normed, labels=labels, made=made)
        return nats, kept if keeps else None

    def _turn_to_gradient(self, normed: torch.Tensor, labels: torch.Tensor, nats: torch.Tensor) -> torch.Tensor:
        """The gradient of each row's own nats by its logits [rows, V]; `nats` are written."""
        logits = torch.mm(normed, self.weight.t())
        self.operations.cross_entropy_(logits, labels, nats)
        return logits

    def backward(self, upstream: Upstream, kept: KeptFullHead, targets: torch.Tensor, residual: torch.Tensor) -> None:
        """`residual` [T, H] becomes the gradient of the last block's output."""
        counts = upstream.by_target[:, None]
        if kept.made is not None and upstream.shared is not None and self.gradients.is_whole(kept.made.of_weight):
            of_normed = kept.made.of_normed
            place = self.gradients.place(self.weight_region)
            torch.mul(place.tensor, upstream.shared, out=place.tensor)
        else:
            of_normed = self._make_again(counts, kept)
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

    def _make_again(self, counts: torch.Tensor, kept: KeptFullHead) -> torch.Tensor:
        """The gradient of the normed rows by each target's own nats; the weight's, by what they count, is placed."""
        of_normed = torch.empty_like(kept.normed)
        unused = torch.empty(len(kept.labels), device=counts.device, dtype=torch.float32)
        place = self.gradients.place(self.weight_region)
        if not len(kept.labels) and not place.adds:
            place.tensor.zero_()
        for first in range(0, len(kept.labels), HEAD_ROWS):
            chunk = slice(first, first + HEAD_ROWS)
            of_logits = self._turn_to_gradient(kept.normed[chunk], kept.labels[chunk], unused[chunk])
            torch.mm(of_logits, self.weight, out=of_normed[chunk])
            # Rows rather than logits: there are fewer of them.
            weighed = (kept.normed[chunk] * counts[chunk]).to(of_logits.dtype)
            self.kernels.weigh(of_logits, weighed, place.tensor, adds=place.adds or first > 0)
            del of_logits
        return of_normed
