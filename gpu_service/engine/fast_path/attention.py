"""Causal attention of flat packed tokens, forward and backward, without a mask of tokens by tokens.

On CUDA the kernels of FlashAttention-2 inside torch, and on Hopper cuDNN's where all sequences of a pass have one
length and it is the faster; elsewhere torch's fused attention, one sequence after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_service.engine.training.flat_attention import FlatLayout, attend_flat

# Where cuDNN's kernels are worth a try: they are the faster ones on Hopper, not before.
_CUDNN_CAPABILITY = (9, 0)
_SHORTEST_FOR_CUDNN = 256
_TIMED_PASSES = 4


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


class CudnnAttention:
    """cuDNN's kernels, for sequences that are all of one length."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds
    ) -> tuple[torch.Tensor, Any]:
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in (query, key, value)]
            queries, keys, values = (part.unflatten(0, (-1, bounds.longest)).transpose(1, 2) for part in leaves)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                output = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            output = output.transpose(1, 2).flatten(0, 1)
        return output.detach(), (output, leaves)

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
        of_query, of_key, of_value = torch.autograd.grad(graph, leaves, gradient)
        return of_query, of_key, of_value


class CudaAttention:
    """The faster of the two for each kind of pass, timed at the first one of its kind and kept from then on."""

    def __init__(self) -> None:
        self._flash, self._cudnn = FlashAttention(), CudnnAttention()
        # By length and number of sequences.
        self._chosen: dict[tuple[int, int], Attention] = {}

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds
    ) -> tuple[torch.Tensor, Any]:
        chosen = self._choose(query, key, value, bounds)
        output, kept = chosen.forward(query, key, value, bounds)
        return output, (chosen, kept)

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
        chosen, rest = kept
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = chosen.backward(
            gradient, query, key, value, output, rest, bounds
        )
        return gradients

    def _choose(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds) -> Attention:
        lengths = bounds.layout.lengths
        if bounds.longest < _SHORTEST_FOR_CUDNN or any(length != bounds.longest for length in lengths):
            return self._flash
        # Who asks torch for the same bits each time gets them from FlashAttention's kernels alone.
        if torch.are_deterministic_algorithms_enabled():
            return self._flash
        kind = (bounds.longest, len(lengths))
        if kind not in self._chosen:
            candidates: tuple[Attention, ...] = (self._flash, self._cudnn)
            times = [_time(one, query, key, value, bounds) for one in candidates]
            self._chosen[kind] = candidates[times.index(min(times))]
        return self._chosen[kind]


def _time(attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds) -> float:
    """Milliseconds of a pass forward and back, once it is warm. The host waits for the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(_TIMED_PASSES):
        if number == 1:
            start.record()
        output, kept = attention.forward(query, key, value, bounds)
        attention.backward(output, query, key, value, output, kept, bounds)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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
            queries, keys, values = (part.detach().requires_grad_() for part in (query, key, value))
            again = _attend(queries, keys, values, bounds)
        of_query, of_key, of_value = torch.autograd.grad(again, (queries, keys, values), gradient)
        return of_query, of_key, of_value


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    return attend_flat(query, key, value, bounds.layout)[0].transpose(0, 1)


def attention_for(device: torch.device, dtype: torch.dtype) -> Attention:
    """FlashAttention's kernels take 16-bit numbers on CUDA; everything else goes sequence by sequence."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return CudaAttention() if torch.cuda.get_device_capability(device) >= _CUDNN_CAPABILITY else FlashAttention()
    return TorchAttention()
