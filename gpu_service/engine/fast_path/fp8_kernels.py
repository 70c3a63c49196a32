# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Products in 8 bits on CUDA: rounding of rows in Triton, and cuBLAS' product.

`fp8_reference` says what each computes; `fp8_rank_kernels` round rows and make the adapters' ranks on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpu_service.engine.fast_path import fp8_reference
from gpu_service.engine.fast_path.fp8_reference import RoundedCopy
from gpu_service.engine.fast_path.launching import kernel

LARGEST = tl.constexpr(fp8_reference.LARGEST)
_OUT_ROWS = 64


@triton.jit
def high_part(units):
    """The nearest number of 8 bits."""
    return units.to(tl.float8e4nv).to(tl.float32)


@triton.jit
def inverse_of(largest):
    """Divided as the processor divides: an approximation would round some values to their neighbor."""
    return tl.div_rn(tl.zeros_like(largest) + LARGEST, largest)


@kernel
def _round_rows(
    x, ranks, values, scales, x_row, ranks_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, USED: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
    LEAST: tl.constexpr, HEADROOM: tl.constexpr, OF_LOW: tl.constexpr, OF_LAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column, beside = tl.arange(0, BLOCK), tl.arange(0, SPAN)
    inside = column < WIDTH
    wide = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide))
    if USED:
        theirs = tl.load(ranks + row * ranks_row + beside % USED, mask=beside < 3 * USED, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(theirs)))
    largest = tl.maximum(largest, LEAST) * HEADROOM
    inverse = inverse_of(largest)
    tl.store(scales + row, tl.div_rn(largest, LARGEST))
    at = values + row * COLUMNS
    tl.store(at + COLUMNS - WIDTH + column, (wide * inverse).to(tl.float8e4nv), mask=inside)
    if COLUMNS > WIDTH:
        if USED:
            units = theirs * inverse
            high = high_part(units)
            units = tl.where(beside < USED, high, tl.where(beside < 2 * USED, (units - high) * OF_LOW, high * OF_LAST))
        else:
            units = tl.zeros((SPAN,), dtype=tl.float32)
        tl.store(at + beside, units.to(tl.float8e4nv), mask=beside < COLUMNS - WIDTH)


@kernel
def _gate_and_round(
    gate_up, out, values, scales, bound, in_row, out_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column, beside = tl.arange(0, BLOCK), tl.arange(0, SPAN)
    inside = column < WIDTH
    gates = tl.load(gate_up + row * in_row + column, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(gate_up + row * in_row + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    gated = (gates * tl.sigmoid(gates) * ups).to(out.dtype.element_ty)
    tl.store(out + row * out_row + column, gated, mask=inside)
    wide = gated.to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(wide * wide))
    largest = tl.maximum(tl.maximum(tl.max(tl.abs(wide)), norm * tl.load(bound)), LEAST)
    tl.store(scales + row, tl.div_rn(largest, LARGEST))
    at = values + row * COLUMNS
    tl.store(at + COLUMNS - WIDTH + column, (wide * inverse_of(largest)).to(tl.float8e4nv), mask=inside)
    if COLUMNS > WIDTH:
        zeros = tl.zeros((SPAN,), dtype=tl.float32).to(tl.float8e4nv)
        tl.store(at + beside, zeros, mask=beside < COLUMNS - WIDTH)


@kernel
def _bound_ranks(
    table, bounds, MOST_RANKS: tl.constexpr, WIDEST: tl.constexpr, KIND: tl.constexpr, MORE: tl.constexpr,
    RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    table += 4 * group
    factors = tl.load(table).to(tl.pointer_type(KIND))
    # Sides of layers are multiples of 16: the plan saw to it.
    num_ranks, width, row = tl.load(table + 1), tl.load(table + 2), tl.multiple_of(tl.load(table + 3), 16)
    rank, column = tl.arange(0, RANKS), tl.arange(0, BLOCK)
    largest = tl.zeros((RANKS,), dtype=tl.float32)
    for first_rank in range(0, MOST_RANKS, RANKS):
        total = tl.zeros((RANKS, BLOCK), dtype=tl.float32)
        for first in range(0, WIDEST, BLOCK):
            mask = (first_rank + rank < num_ranks)[:, None] & (first + column < width)[None, :]
            at = factors + (first_rank + rank)[:, None] * row + (first + column)[None, :]
            number = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            total += number * number
        largest = tl.maximum(largest, tl.sum(total, 1))
    bound = tl.load(bounds + group).to(tl.pointer_type(tl.float32))
    tl.store(bound, tl.sqrt_rn(tl.max(largest)) * MORE)


@kernel
def _round_out(flat, programs, table, factors, KIND: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr):
    part = tl.load(programs + 2 * tl.program_id(0))
    row = tl.load(programs + 2 * tl.program_id(0) + 1) + tl.arange(0, ROWS)
    rank = tl.arange(0, RANKS)
    table += 9 * part
    start, num_rows, num_ranks = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    row_step, rank_step = tl.load(table + 3), tl.load(table + 4)
    values = tl.load(table + 5).to(tl.pointer_type(tl.float8e4nv))
    values_row, step = tl.load(table + 6), tl.load(table + 7)
    scales = tl.load(table + 8).to(tl.pointer_type(tl.float32))
    in_rows = row < num_rows
    mask = in_rows[:, None] & (rank < num_ranks)[None, :]
    numbers = tl.load(flat + start + row[:, None] * row_step + rank[None, :] * rank_step, mask=mask, other=0.0)
    factors += 3 * part
    numbers = (numbers * tl.load(factors)).to(KIND).to(tl.float32)
    scale = tl.load(scales + row, mask=in_rows, other=1.0)
    units = numbers * tl.div_rn(tl.zeros_like(scale) + 1.0, scale)[:, None]
    # The conversion would take the largest number for what is larger.
    units = tl.where(tl.abs(units) > LARGEST, float("nan"), units)
    at = values + row[:, None] * values_row + rank[None, :]
    high = high_part(units)
    tl.store(at, high.to(tl.float8e4nv), mask=mask)
    tl.store(at + step, (high * tl.load(factors + 1)).to(tl.float8e4nv), mask=mask)
    tl.store(at + 2 * step, ((units - high) * tl.load(factors + 2)).to(tl.float8e4nv), mask=mask)


def empty_rounded(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty((rows, columns), device=device, dtype=torch.float8_e4m3fn)
    return values, torch.empty((rows, 1), device=device, dtype=torch.float32)


def _round(
    x: torch.Tensor, ranks: torch.Tensor | None, columns: int, *, least: float, headroom: float, small_ranks: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    values, scales = empty_rounded(rows, columns, x.device)
    block = triton.next_power_of_2(width)
    of_low, of_last = fp8_reference.rank_factors(small_ranks=small_ranks)
    _round_rows[(rows,)](
        x, x if ranks is None else ranks, values, scales, x.stride(0), 0 if ranks is None else ranks.stride(0),
        WIDTH=width, BLOCK=block, USED=0 if ranks is None else ranks.shape[1], COLUMNS=columns,
        SPAN=triton.next_power_of_2(max(columns - width, 1)), LEAST=least, HEADROOM=headroom,
        OF_LOW=of_low, OF_LAST=of_last, num_warps=min(8, max(1, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return values, scales


def round_rows(
    x: torch.Tensor, ranks: torch.Tensor | None, columns: int, *, small_ranks: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _round(x, ranks, columns, least=fp8_reference.SMALLEST, headroom=1.0, small_ranks=small_ranks)


def round_weights(weights: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _round(
        weights,
        None,
        columns,
        least=fp8_reference.LEAST_WEIGHT,
        headroom=fp8_reference.HEADROOM,
        small_ranks=False,
    )


def gate_and_round(
    gate_up: torch.Tensor, out: torch.Tensor, bound: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = out.shape
    values, scales = empty_rounded(rows, columns, out.device)
    block = triton.next_power_of_2(width)
    # Compiled as the gate by itself is: its bits are wanted again where rows are made again.
    _gate_and_round[(rows,)](
        gate_up, out, values, scales, bound, gate_up.stride(0), out.stride(0), WIDTH=width, BLOCK=block,
        COLUMNS=columns, SPAN=triton.next_power_of_2(max(columns - width, 1)), LEAST=fp8_reference.SMALLEST,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return values, scales


@dataclass(frozen=True, kw_only=True)
class _Bounds:
    """Tables on the device; `factors` and `bounds` are kept alive: the tables hold addresses."""

    factors: tuple[torch.Tensor, ...]
    bounds: tuple[torch.Tensor, ...]
    table: torch.Tensor
    addresses: torch.Tensor


def prepare_bounds(factors: Sequence[torch.Tensor], bounds: Sequence[torch.Tensor]) -> _Bounds | None:
    if not factors:
        return None
    table = [(one.data_ptr(), *one.shape, one.stride(0)) for one in factors]
    device = factors[0].device
    return _Bounds(
        factors=tuple(factors),
        bounds=tuple(bounds),
        table=torch.tensor(table, dtype=torch.int64, device=device),
        addresses=torch.tensor([bound.data_ptr() for bound in bounds], dtype=torch.int64, device=device),
    )


def bound_ranks(prepared: _Bounds | None) -> None:
    if prepared is None:
        return
    _bound_ranks[(len(prepared.factors),)](
        prepared.table, prepared.addresses, MOST_RANKS=max(one.shape[0] for one in prepared.factors),
        WIDEST=max(one.shape[1] for one in prepared.factors), KIND=_KINDS[prepared.factors[0].dtype],
        MORE=fp8_reference.MORE, RANKS=16, BLOCK=512, num_warps=8,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Rounded:
    """Tables on the device; `copies` keep what is written to alive: the tables hold addresses."""

    copies: tuple[RoundedCopy, ...]
    programs: torch.Tensor
    table: torch.Tensor
    factors: torch.Tensor
    block: int


_KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def prepare_rounded(copies: Sequence[RoundedCopy]) -> _Rounded | None:
    if not copies:
        return None
    device = copies[0].values.device
    programs = [(number, first) for number, one in enumerate(copies) for first in range(0, one.rows, _OUT_ROWS)]
    table = [
        (
            one.start, one.rows, one.rank, one.row_step, one.rank_step, one.values.data_ptr(), one.values.stride(0),
            one.step, one.scales.data_ptr(),
        )
        for one in copies
    ]  # fmt: skip
    factors = [(one.factor, *fp8_reference.weight_factors(small_ranks=one.small_ranks)) for one in copies]
    return _Rounded(
        copies=tuple(copies),
        programs=torch.tensor(programs, dtype=torch.int32, device=device),
        table=torch.tensor(table, dtype=torch.int64, device=device),
        factors=torch.tensor(factors, dtype=torch.float32, device=device),
        block=triton.next_power_of_2(max(one.rank for one in copies)),
    )


def round_out(flat: torch.Tensor, prepared: _Rounded | None, dtype: torch.dtype) -> None:
    if prepared is None:
        return
    _round_out[(len(prepared.programs),)](
        flat, prepared.programs, prepared.table, prepared.factors, KIND=_KINDS[dtype], ROWS=_OUT_ROWS,
        RANKS=prepared.block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def multiply_rounded(
    values: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, weight_scales: torch.Tensor, out: torch.Tensor
) -> None:
    # Scales of rows are offered for this type alone.
    product = out if out.dtype is torch.bfloat16 else torch.empty_like(out, dtype=torch.bfloat16)
    torch._scaled_mm(
        values, weights.t(), scales, weight_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True, out=product
    )
    if product is not out:
        out.copy_(product)
