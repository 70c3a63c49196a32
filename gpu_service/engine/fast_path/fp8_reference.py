"""What the kernels for 8 bits compute, in plain torch: rows as e4m3 with a scale a row, an adapter's part among them.

An adapter's ranks t = x A' and its B have about as many bits as in bfloat16, each as two numbers of 8 bits, the rounded
one and what that left: three products of them, high by high, low by high and high by low, are further columns of the
one product. They come first: a product in 8 bits is summed up in few bits more than bfloat16 has, and what is small is
lost beside what is large already. Of a pair one may be small, as B is forward, and backward what comes back through it:
its low part is times 16, and what that meets a 16th, or else it would end where the type's numbers end.
`torch_reference` offers these functions as its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# The largest number of e4m3.
LARGEST = 448.0
# Of a row of zeros.
SMALLEST = 1e-12
# A row of weights is scaled as if its largest were so many times what it is: what an adapter puts beside them may be
# that large. NF4 spans few of the type's 15 octaves, so that it costs no bit.
HEADROOM = 16.0
# What the largest of a row of weights counts at least: beside rows of zeros, too, an adapter has room.
LEAST_WEIGHT = 2.0**-5
_TERMS = 3
# A low part times this is no larger than its high part.
_FINER = 16.0
# Of a bound, for what rounding adds to what it bounds.
MORE = 1.01
# Products read so many bytes of a row at a time.
_TILE = 128


@dataclass(frozen=True, kw_only=True)
class RoundedCopy:
    """Where one A or B lies in a flat buffer, as [rows, rank], and where it goes in 8 bits.

    `values` are the weights' rows from the first column that it goes to, `step` the columns from a term to the next;
    `scales` are the rows' [rows, 1]. `small_ranks` as in `round_rows`.
    """

    start: int
    rows: int
    rank: int
    row_step: int
    rank_step: int
    factor: float
    values: torch.Tensor
    scales: torch.Tensor
    step: int
    small_ranks: bool


def padded(columns: int, num_ranks: int) -> int:
    """Columns in 8 bits of rows of `columns` with so many ranks before them, and zeros between."""
    return -(-(columns + _TERMS * num_ranks) // _TILE) * _TILE if num_ranks else columns


def to_8_bits(x: torch.Tensor) -> torch.Tensor:
    """Nearest numbers of e4m3."""
    return x.to(torch.float8_e4m3fn)


def rank_factors(*, small_ranks: bool) -> tuple[float, float]:
    """What ranks' low part, and their high part where it is once more, are multiplied by."""
    return (_FINER, 1.0) if small_ranks else (1.0, 1 / _FINER)


def weight_factors(*, small_ranks: bool) -> tuple[float, float]:
    """What weights' high part, where it meets the ranks' low one, and their low part are multiplied by."""
    return (1 / _FINER, 1.0) if small_ranks else (1.0, _FINER)


def _halves(units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`units` in 8 bits, as float32, and what that left of it."""
    high = to_8_bits(units).float()
    return high, units - high


def _place(x: torch.Tensor, parts: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """The parts side by side, zeros, and x."""
    values = torch.zeros((x.shape[0], columns), dtype=x.dtype, device=x.device)
    values[:, columns - x.shape[1] :].copy_(x)
    first = 0
    for part in parts:
        values[:, first : first + part.shape[1]].copy_(part)
        first += part.shape[1]
    return values


def round_rows(
    x: torch.Tensor, ranks: torch.Tensor | None, columns: int, *, small_ranks: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [T, K], and `ranks` [T, R] before it, in e4m3 [T, columns]; the scales that rows were divided by [T, 1].

    A row's largest number becomes the type's largest. Ranks come as high, low and high again, then zeros, then `x`;
    with `small_ranks` it is they that may be small, else the weights that they meet.
    """
    wide, theirs = x.float(), None if ranks is None else ranks.float()
    largest = wide.abs().amax(1, keepdim=True)
    if theirs is not None:
        largest = torch.maximum(largest, theirs.abs().amax(1, keepdim=True))
    largest = largest.clamp(min=SMALLEST)
    # By a tensor: by a number, CUDA multiplies with its reciprocal, which rounds once more.
    full = torch.full_like(largest, LARGEST)
    inverse = full / largest
    parts: list[torch.Tensor] = []
    if theirs is not None:
        high, low = _halves(theirs * inverse)
        of_low, of_last = rank_factors(small_ranks=small_ranks)
        parts = [to_8_bits(high), to_8_bits(low * of_low), to_8_bits(high * of_last)]
    return _place(to_8_bits(wide * inverse), parts, columns), largest / full


def rank_rows(x: torch.Tensor, factors: torch.Tensor, ranks: torch.Tensor) -> None:
    """`ranks` [T, R] become `x` [T, K] times `factors` [R, K] transposed."""
    torch.mm(x, factors.t(), out=ranks)


def rank_and_round(
    x: torch.Tensor, factors: torch.Tensor, ranks: torch.Tensor, columns: int, *, small_ranks: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rank_rows`, and `round_rows` of `x` with what `ranks` became."""
    rank_rows(x, factors, ranks)
    return round_rows(x, ranks, columns, small_ranks=small_ranks)


def round_weights(weights: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`weights` [N, K] in e4m3 [N, columns], zeros before them, and their scales [N, 1], with headroom."""
    wide = weights.float()
    largest = wide.abs().amax(1, keepdim=True).clamp(min=LEAST_WEIGHT) * HEADROOM
    full = torch.full_like(largest, LARGEST)
    return _place(to_8_bits(wide * (full / largest)), [], columns), largest / full


def prepare_bounds(factors: Sequence[torch.Tensor], bounds: Sequence[torch.Tensor]) -> Any:
    """What `bound_ranks` needs for these: each [R, K], and a float32 that says of it what it says."""
    return tuple(zip(factors, bounds, strict=True))


def bound_ranks(prepared: Any) -> None:
    """No rank of a row is larger than the row's norm times what each bound becomes, its factors being what they are."""
    for factors, bound in prepared:
        bound.copy_(factors.float().norm(dim=1).max() * MORE)


def round_bounded(x: torch.Tensor, bound: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`round_rows` without ranks, that leaves room for them: a row is scaled as if its largest were no less than
    `bound` times its norm. Bits are lost of numbers alone that are nothing in a row of so large a norm.
    """
    wide = x.float()
    largest = torch.maximum(wide.abs().amax(1, keepdim=True), wide.square().sum(1, keepdim=True).sqrt() * bound)
    largest = largest.clamp(min=SMALLEST)
    full = torch.full_like(largest, LARGEST)
    return _place(to_8_bits(wide * (full / largest)), [], columns), largest / full


def rank_beside(
    x: torch.Tensor, factors: torch.Tensor, ranks: torch.Tensor, values: torch.Tensor, scales: torch.Tensor,
) -> None:  # fmt: skip
    """`rank_rows`, and ranks as `round_rows` has them go before the rows in `values` [T, ...], which have `scales`."""
    rank_rows(x, factors, ranks)
    high, low = _halves(ranks.float() * (torch.ones_like(scales) / scales))
    of_low, of_last = rank_factors(small_ranks=False)
    used = ranks.shape[1]
    for term, part in enumerate((high, low * of_low, high * of_last)):
        values[:, term * used : (term + 1) * used].copy_(to_8_bits(part))


def prepare_rounded(copies: Sequence[RoundedCopy]) -> Any:
    """What `round_out` needs for these."""
    return tuple(copies)


def round_out(flat: torch.Tensor, prepared: Any, dtype: torch.dtype) -> None:
    """Write the matrices that lie in `flat`, times their factors and as they are in `dtype`, before the weights.

    As high, high again and low. What has no room, by more than the headroom, is not a number there.
    """
    for one in prepared:
        start = flat.storage_offset() + one.start
        numbers = flat.as_strided((one.rows, one.rank), (one.row_step, one.rank_step), start) * one.factor
        units = numbers.to(dtype).float() * (torch.ones_like(one.scales) / one.scales)
        high, low = _halves(torch.where(units.abs() > LARGEST, torch.nan, units))
        of_second, of_low = weight_factors(small_ranks=one.small_ranks)
        for term, part in enumerate((high, high * of_second, low * of_low)):
            one.values[:, term * one.step : term * one.step + one.rank].copy_(to_8_bits(part))


def multiply_rounded(
    values: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, weight_scales: torch.Tensor, out: torch.Tensor
) -> None:
    """`out` [T, N]: `values` [T, K] times `weights` [N, K] transposed, both e4m3, times scales [T, 1] and [N, 1]."""
    out.copy_(torch.mm(values.float(), weights.float().t()) * scales * weight_scales.t())
