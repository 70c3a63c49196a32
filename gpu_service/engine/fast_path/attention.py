"""Causal attention of flat packed tokens, forward and backward: FlashAttention-2's kernels inside torch on CUDA, torch's
fused attention one sequence after another elsewhere. No mask of tokens by tokens is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gpu_service.engine.training.flat_attention import FlatLayout, attend_flat


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where the sequences of a pass lie: int32 [S + 1] on the device, the longest, and the same on the host."""

    starts: torch.Tensor
    longest: int
    layout: FlatLayout


class Attention(Protocol):
    """Queries are [T, heads, D], keys and values [T, key-value heads, D]; each head's D are contiguous."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds
    ) -> tuple[torch.Tensor, Any]:
        """The output [T, heads, D], and what the backward pass needs of it besides."""
        ...

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        kept: Any,
        bounds: Bounds,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value."""
        ...


class FlashAttention:
    """The kernels of FlashAttention-2 that torch brings, for sequences of any lengths in one launch."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds
    ) -> tuple[torch.Tensor, Any]:
        output, statistics, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, bounds.starts, bounds.starts, bounds.longest, bounds.longest, 0.0, True, False
        )
        return output, (statistics, state, unused)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        kept: Any,
        bounds: Bounds,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        statistics, state, unused = kept
        starts, longest = bounds.starts, bounds.longest
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
            gradient, query, key, value, output, statistics, starts, starts, longest, longest, 0.0, True, state, unused
        )
        return gradients


class TorchAttention:
    """The attention of the plain path, differentiated by autograd."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds
    ) -> tuple[torch.Tensor, Any]:
        return _attend(query, key, value, bounds), None

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        kept: Any,
        bounds: Bounds,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in (query, key, value)]
            again = _attend(*leaves, bounds)
        of_query, of_key, of_value = torch.autograd.grad(again, leaves, gradient)
        return of_query, of_key, of_value


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    return attend_flat(query, key, value, bounds.layout)[0].transpose(0, 1)


def attention_for(device: torch.device, dtype: torch.dtype) -> Attention:
    """FlashAttention's kernels take 16-bit numbers on CUDA; everything else goes sequence by sequence."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return FlashAttention()
    return TorchAttention()
