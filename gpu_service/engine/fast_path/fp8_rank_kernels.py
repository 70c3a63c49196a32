# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Adapters' ranks for products in 8 bits on CUDA, in Triton: made of rows by the program that rounds these.

`fp8_reference` says what each computes, and computes ranks that are wider than the kernel takes, or float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_service.engine.fast_path import fp8_reference
from gpu_service.engine.fast_path.fp8_kernels import LARGEST, empty_rounded, high_part, inverse_of, round_rows
from gpu_service.engine.fast_path.launching import kernel

_WIDEST_RANKS = 128
# Rows, columns at a time, warps and stages of a program that makes ranks, by the width that these are padded to.
_RANK_SHAPES = {16: (64, 128, 8, 4), 32: (64, 128, 8, 4), 64: (64, 128, 8, 4), 128: (32, 64, 4, 4)}


@triton.jit
def _settled(total):
    """`total`, read here, so that its product has ended: from 64 rows on Hopper multiplies in the background, and
    Triton (3.6) keeps one buffer too few for it where what is multiplied is read by something else as well.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1)


@kernel
def _rank_and_round(
    x, factors, ranks, values, scales, x_row, factors_rank, factors_column, ranks_row, num_rows,
    WIDTH: tl.constexpr, USED: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, PADDING: tl.constexpr,
    ROWS: tl.constexpr, AT_ONCE: tl.constexpr, ROUNDS: tl.constexpr, BESIDE: tl.constexpr, LEAST: tl.constexpr,
    OF_LOW: tl.constexpr, OF_LAST: tl.constexpr,
):  # fmt: skip
    """Rows that are rounded are read twice: their scale is that of their ranks too. `BESIDE` rows that have been
    rounded, their ranks are by the scale that there is.
    """
    begin = tl.program_id(0).to(tl.int64) * ROWS
    near, some, rank = tl.arange(0, ROWS), tl.arange(0, AT_ONCE), tl.arange(0, RANKS)
    in_rows, in_ranks = begin + near < num_rows, rank < USED
    x += begin * x_row
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    largest = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, WIDTH, AT_ONCE):
        column = first + some
        piece = tl.load(
            x + near[:, None] * x_row + column[None, :], mask=in_rows[:, None] & (column < WIDTH)[None, :], other=0.0
        )
        theirs = tl.load(
            factors + column[:, None] * factors_column + rank[None, :] * factors_rank,
            mask=(column < WIDTH)[:, None] & in_ranks[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(piece, theirs, total)
        if ROUNDS:
            total = _settled(total)
            largest = tl.maximum(largest, tl.max(tl.abs(piece), 1).to(tl.float32))
    made = total.to(ranks.dtype.element_ty)
    mask = in_rows[:, None] & in_ranks[None, :]
    tl.store(ranks + begin * ranks_row + near[:, None] * ranks_row + rank[None, :], made, mask=mask)
    made = made.to(tl.float32)
    values += begin * COLUMNS
    if ROUNDS:
        largest = tl.maximum(tl.maximum(largest, tl.max(tl.abs(made), 1)), LEAST)
        inverse = inverse_of(largest)
        tl.store(scales + begin + near, tl.div_rn(largest, LARGEST), mask=in_rows)
        for first in range(0, WIDTH, AT_ONCE):
            column = first + some
            inside = in_rows[:, None] & (column < WIDTH)[None, :]
            piece = tl.load(x + near[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
            rounded = (piece * inverse[:, None]).to(tl.float8e4nv)
            tl.store(values + near[:, None] * COLUMNS + (COLUMNS - WIDTH + column)[None, :], rounded, mask=inside)
        if COLUMNS > WIDTH + 3 * USED:
            spare = 3 * USED + tl.arange(0, PADDING)
            zeros = tl.zeros((ROWS, PADDING), dtype=tl.float32).to(tl.float8e4nv)
            tl.store(
                values + near[:, None] * COLUMNS + spare[None, :], zeros,
                mask=in_rows[:, None] & (spare < COLUMNS - WIDTH)[None, :],
            )  # fmt: skip
    if BESIDE:
        inverse = tl.load(scales + begin + near, mask=in_rows, other=1.0)
        inverse = tl.div_rn(tl.zeros_like(inverse) + 1.0, inverse)
    if ROUNDS or BESIDE:
        units = made * inverse[:, None]
        high = high_part(units)
        at = values + near[:, None] * COLUMNS + rank[None, :]
        tl.store(at, high.to(tl.float8e4nv), mask=mask)
        tl.store(at + USED, ((units - high) * OF_LOW).to(tl.float8e4nv), mask=mask)
        tl.store(at + 2 * USED, (high * OF_LAST).to(tl.float8e4nv), mask=mask)


def _has_kernel(x: torch.Tensor, factors: torch.Tensor) -> bool:
    return factors.shape[0] <= _WIDEST_RANKS and x.dtype is not torch.float32


def _launch_ranks(
    x: torch.Tensor, factors: torch.Tensor, ranks: torch.Tensor, values: torch.Tensor, scales: torch.Tensor,
    *, rounds: bool = False, beside: bool = False, small_ranks: bool = False,
) -> None:  # fmt: skip
    (rows, width), used, columns = x.shape, factors.shape[0], values.shape[1]
    block = max(16, triton.next_power_of_2(used))
    at_once, columns_at_once, warps, stages = _RANK_SHAPES[block]
    of_low, of_last = fp8_reference.rank_factors(small_ranks=small_ranks)
    _rank_and_round[(triton.cdiv(rows, at_once),)](
        x, factors, ranks, values, scales, x.stride(0), factors.stride(0), factors.stride(1), ranks.stride(0), rows,
        WIDTH=width, USED=used, COLUMNS=columns, RANKS=block,
        PADDING=triton.next_power_of_2(max(columns - width - 3 * used, 1)), ROWS=at_once, AT_ONCE=columns_at_once,
        ROUNDS=rounds, BESIDE=beside, LEAST=fp8_reference.SMALLEST, OF_LOW=of_low, OF_LAST=of_last,
        num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip


def rank_rows(x: torch.Tensor, factors: torch.Tensor, ranks: torch.Tensor) -> None:
    if not _has_kernel(x, factors):
        fp8_reference.rank_rows(x, factors, ranks)
        return
    _launch_ranks(x, factors, ranks, ranks, ranks)


def rank_and_round(
    x: torch.Tensor, factors: torch.Tensor, ranks: torch.Tensor, columns: int, *, small_ranks: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _has_kernel(x, factors):
        fp8_reference.rank_rows(x, factors, ranks)
        return round_rows(x, ranks, columns, small_ranks=small_ranks)
    values, scales = empty_rounded(len(x), columns, x.device)
    _launch_ranks(x, factors, ranks, values, scales, rounds=True, small_ranks=small_ranks)
    return values, scales


def rank_beside(
    x: torch.Tensor, factors: torch.Tensor, ranks: torch.Tensor, values: torch.Tensor, scales: torch.Tensor,
) -> None:  # fmt: skip
    if not _has_kernel(x, factors):
        fp8_reference.rank_beside(x, factors, ranks, values, scales)
        return
    _launch_ranks(x, factors, ranks, values, scales, beside=True)
