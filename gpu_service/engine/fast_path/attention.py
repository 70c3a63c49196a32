"""Causal attention of flat packed tokens, forward and backward, without a mask of tokens by tokens.

On CUDA the kernels of FlashAttention-2 inside torch, and from Hopper on whichever is the fastest (`attention_choice`);
elsewhere torch's fused attention, one sequence after another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_service.engine.training.flat_attention import FlatLayout, attend_flat

# Where there is a choice: cuDNN's kernels are the faster ones on Hopper, not before, and FlashAttention-4 has none.
_CHOICE_CAPABILITY = (9, 0)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where the sequences of a pass lie: int32 [S + 1] on the device, the longest, and the same on the host."""

    starts: torch.Tensor
    longest: int
    layout: FlatLayout
    # Whether a pass is recorded, and played for others: as many tokens, in other sequences, none longer than `longest`.
    lengths_vary: bool = False


class Attention(Protocol):
    """Queries are [T, heads, D], keys and values [T, key-value heads, D]; each head's D are contiguous."""

    # Whether kernels read on the device where sequences begin, so that they can be played again for others.
    lengths_may_vary: bool

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

    lengths_may_vary = True

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


class DifferentiatedAttention(ABC):
    """Kernels that autograd knows how to go back through: what is kept of a pass is its graph, for one way back."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds
    ) -> tuple[torch.Tensor, Any]:
        with torch.enable_grad():
            query, key, value = leaves = tuple(part.detach().requires_grad_() for part in (query, key, value))
            output = self._attend(query, key, value, bounds)
        return output.detach(), (output, leaves)

    @abstractmethod
    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """The output [T, heads, D]."""

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
        graph, leaves = kept
        return _go_back(graph, leaves, gradient)


class CudnnAttention(DifferentiatedAttention):
    """cuDNN's kernels, for sequences that are all of one length."""

    lengths_may_vary = False

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        queries, keys, values = (
            part.unflatten(0, (-1, bounds.longest)).transpose(1, 2) for part in (query, key, value)
        )
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            output = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).flatten(0, 1)


class TorchAttention:
    """The attention of the plain path, differentiated by autograd."""

    lengths_may_vary = False

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
            queries, keys, values = (part.detach().requires_grad_() for part in (query, key, value))
            again = _attend(queries, keys, values, bounds)
        return _go_back(again, (queries, keys, values), gradient)


class _Handed(torch.autograd.Function):
    """A number without a value whose gradient is, before `output`, whatever tensor it was given."""

    @staticmethod
    def forward(context: Any, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        context.gradient = gradient
        return output.new_empty(())

    @staticmethod
    def backward(context: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return context.gradient, None


def _go_back(
    output: torch.Tensor, leaves: Sequence[torch.Tensor], gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the three `leaves`, `gradient` being that of `output`.

    Not handed to torch: it compares the shape of a gradient that it is given by way of its symbolic shapes, and imports
    sympy for that the first time, which takes seconds in the middle of a training.
    """
    with torch.enable_grad():
        handed = _Handed.apply(output, gradient)
    of_query, of_key, of_value = torch.autograd.grad(handed, leaves)
    return of_query, of_key, of_value


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    return attend_flat(query, key, value, bounds.layout)[0].transpose(0, 1)


def attention_for(device: torch.device, dtype: torch.dtype) -> Attention:
    """FlashAttention's kernels take 16-bit numbers on CUDA; everything else goes sequence by sequence."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return TorchAttention()
    if torch.cuda.get_device_capability(device) < _CHOICE_CAPABILITY:
        return FlashAttention()
    # Built on what stands above.
    from gpu_service.engine.fast_path.attention_choice import AttentionChoice

    return AttentionChoice()
