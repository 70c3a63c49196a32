"""What every kernel of the fast path computes, in plain torch: the reference that tests hold the kernels to, and what a
CPU runs. Sums and products are made in float32 and rounded once. Matrices may be views whose rows lie further apart
than they are wide; their last dimension is always contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.fp8_reference import (
    bound_ranks,
    multiply_rounded,
    prepare_bounds,
    prepare_rounded,
    rank_and_round,
    rank_beside,
    rank_rows,
    round_bounded,
    round_out,
    round_rows,
    round_weights,
)

__all__ = [
    "RankPart",
    "Ranks",
    "adapter_backward",
    "add_norm",
    "bound_ranks",
    "copy_out",
    "cross_entropy_",
    "gate",
    "gate_adapter_backward_",
    "gate_and_round",
    "gate_backward_",
    "head_norm",
    "head_norm_backward",
    "multiply_rounded",
    "nf4_dequantize",
    "norm_backward_",
    "prepare_bounds",
    "prepare_copies",
    "prepare_ranks",
    "prepare_rounded",
    "rank_and_round",
    "rank_beside",
    "rank_rows",
    "rotate",
    "round_bounded",
    "round_out",
    "round_rows",
    "round_weights",
    "weigh_b",
]


def add_norm(
    x: torch.Tensor, add: torch.Tensor | None, weight: torch.Tensor, epsilon: float, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` [T, H] becomes the RMS norm of `x + add`. The sum (`x` itself without `add`), and 1/rms of its rows [T]."""
    total = x if add is None else x + add
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(1) + epsilon)
    out.copy_(wide * scale[:, None] * weight.float())
    return total, scale


def norm_backward_(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor,
    *,
    adds: bool,
) -> None:
    """Carry `gradient` [T, H] of a norm's output through the norm of `x` into `residual`: added, or in its place."""
    scaled = gradient.float() * weight.float()
    normed = x.float() * scale[:, None]
    through = scale[:, None] * (scaled - normed * (scaled * normed).mean(1, keepdim=True))
    residual.copy_(residual.float() + through if adds else through)


def head_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Each of the `heads` heads of each row of `x` [T, heads * D] normed by itself into `out`. 1/rms: [T * heads]."""
    wide = x.float().unflatten(1, (heads, -1))
    scale = torch.rsqrt(wide.square().mean(2) + epsilon)
    out.copy_((wide * scale[..., None] * weight.float()).flatten(1))
    return scale.flatten()


def head_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, *, heads: int
) -> None:
    """`out` [T, heads * D] becomes the gradient of `head_norm`'s input. May be `gradient` itself."""
    by_head = scale.view(-1, heads, 1)
    scaled = gradient.float().unflatten(1, (heads, -1)) * weight.float()
    normed = x.float().unflatten(1, (heads, -1)) * by_head
    through = by_head * (scaled - normed * (scaled * normed).mean(2, keepdim=True))
    out.copy_(through.flatten(1))


def rotate(
    x: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    *,
    heads: int,
    backward: bool,
) -> None:
    """Rotary positions on the `heads` heads of each row of `x` [T, heads * D] into `out`, which may be `x`.

    `cosines` and `sines` are float32 [positions, D / 2]. `backward` turns the other way.
    """
    cosine, sine = cosines[positions][:, None], sines[positions][:, None]
    if backward:
        sine = -sine
    low, high = x.float().unflatten(1, (heads, 2, -1)).unbind(2)
    turned = torch.stack((low * cosine - high * sine, high * cosine + low * sine), dim=2)
    out.copy_(turned.flatten(1))


def gate(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """`out` [T, I] becomes silu(gate) * up, of `gate_up` [T, 2 * I] with the gates first."""
    gates, ups = gate_up.float().chunk(2, dim=1)
    out.copy_(gates * torch.sigmoid(gates) * ups)


def gate_and_round(
    gate_up: torch.Tensor, out: torch.Tensor, bound: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate`, and `round_bounded` of what `out` became."""
    gate(gate_up, out)
    return round_bounded(out, bound, columns)


def gate_backward_(gradient: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Overwrite `gate_up` with its gradient, `gradient` [T, I] being that of `gate`'s output."""
    gates, ups = gate_up.float().chunk(2, dim=1)
    wide = gradient.float()
    sigmoids = torch.sigmoid(gates)
    gate_up.copy_(torch.cat((wide * ups * sigmoids * (1 + gates * (1 - sigmoids)), wide * gates * sigmoids), dim=1))


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, nats: torch.Tensor) -> None:
    """`nats` [K] float32 become each row's negative log likelihood of its label, `logits` [K, V] its gradient."""
    wide = logits.float()
    normalizer = torch.logsumexp(wide, dim=1)
    at_label = wide.gather(1, labels[:, None])[:, 0]
    nats.copy_(normalizer - at_label)
    gradient = torch.exp(wide - normalizer[:, None])
    gradient.scatter_add_(1, labels[:, None], torch.full_like(at_label, -1.0)[:, None])
    logits.copy_(gradient)


def nf4_dequantize(
    packed: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_codes: torch.Tensor | None,
    nested_scales: torch.Tensor | None,
    offset: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`out` [N, K] becomes the weights of `packed` (uint8, two a byte, the first in the high half; blocks of 64).

    `scales` are float32, one a block; or uint8, places in `nested_codes`, which times `nested_scales` (one for 256
    blocks) and plus `offset` are the blocks' scales.
    """
    if nested_codes is not None:
        assert nested_scales is not None
        assert offset is not None
        whole = nested_scales.repeat_interleave(256)[: scales.numel()]
        scales = nested_codes[scales.int()] * whole + offset
    flat = packed.reshape(-1)
    weights = torch.stack((codes[(flat >> 4).int()], codes[(flat & 15).int()]), dim=1).view(-1, 64)
    out.copy_((weights * scales[:, None]).view(out.shape))


def prepare_copies(copies: Sequence[tuple[int, torch.Tensor, float]]) -> Any:
    """What `copy_out` needs for these: start in the flat buffer, matrix that is written, factor."""
    return tuple(copies)


def copy_out(flat: torch.Tensor, prepared: Any) -> None:
    """Write the matrices that lie in `flat`, without gaps, where they were prepared to go, times their factors."""
    for start, matrix, factor in prepared:
        matrix.copy_(flat[start : start + matrix.numel()].view(matrix.shape) * factor)


@dataclass(frozen=True, kw_only=True)
class RankPart:
    """An adapted layer of a group: its rows of the group's output, its part of the margin, its B in a flat buffer."""

    first_row: int
    num_rows: int
    first_rank: int
    start_b: int


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """What `adapter_backward` needs of a group's adapters, all of one rank, in a margin of `room` columns."""

    parts: tuple[RankPart, ...]
    rank: int
    room: int
    scaling: float
    # Whether `gate_adapter_backward_` is what is wanted for gates and ups, or their parts one by one.
    takes_gates: bool = False


def prepare_ranks(parts: Sequence[RankPart], *, rank: int, room: int, scaling: float, device: torch.device) -> Ranks:
    """What `adapter_backward` and `gate_adapter_backward_` need on `device`. Parts lie one behind another."""
    del device
    return Ranks(parts=tuple(parts), rank=rank, room=room, scaling=scaling)


def adapter_backward(
    gradient: torch.Tensor,
    right: torch.Tensor,
    ranks: torch.Tensor,
    inner: torch.Tensor,
    prepared: Any,
    gradients: torch.Tensor,
) -> None:
    """`inner` [T, room] becomes `gradient` [T, N] times `right` [N, room], and each B's gradient, in the flat
    `gradients`, the product of its part of `gradient` and of `ranks` [T, room], times the scaling.

    `right` is zero but where a layer's rows meet its own ranks.
    """
    torch.mm(gradient, right, out=inner)
    weigh_b(gradient, ranks, prepared, gradients)


def weigh_b(gradient: torch.Tensor, ranks: torch.Tensor, prepared: Any, gradients: torch.Tensor) -> None:
    """The part of `adapter_backward` that makes every B's gradient."""
    for part in prepared.parts:
        columns = gradient[:, part.first_row : part.first_row + part.num_rows]
        its_ranks = ranks[:, part.first_rank : part.first_rank + prepared.rank]
        target = gradients[part.start_b : part.start_b + part.num_rows * prepared.rank].view(part.num_rows, -1)
        torch.addmm(target, columns.t(), its_ranks, beta=0, alpha=prepared.scaling, out=target)


def gate_adapter_backward_(
    gradient: torch.Tensor,
    gate_up: torch.Tensor,
    right: torch.Tensor,
    ranks: torch.Tensor,
    inner: torch.Tensor,
    prepared: Any,
    gradients: torch.Tensor,
) -> None:
    """`gate_backward_`, and `adapter_backward` with what `gate_up` [T, 2 * I] became."""
    gate_backward_(gradient, gate_up)
    adapter_backward(gate_up, right, ranks, inner, prepared, gradients)
